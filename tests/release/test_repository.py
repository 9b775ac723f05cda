"""The hub's side of a release: what is signed, in which order it is written, and what is never overwritten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Targets

from edgeguard.errors import ConfigError, TrustError
from edgeguard.release.keys import HUB_PASSPHRASE, Obtained, Secrets, load, obtain
from edgeguard.release.repository import COUNTERSIGN, EXPIRES, Repository, Wanted
from edgeguard.release.roles import Release
from edgeguard.release.roles import load as load_roles
from tests.simulators.disk import crash_at
from tests.simulators.release import Thief, stolen

SOME = CryptoSigner.generate_ed25519()
OLD, NEW, GUARD = "0" * 64, "1" * 64, "2" * 64


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=timezone.utc)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def repository(tmp_path: Path, clock: Clock) -> Repository:
    return create(tmp_path, clock)


def create(folder: Path, clock: Clock, **wanted: Wanted) -> Repository:
    return Repository.create(folder / "served", folder / "keys", folder / "offline", clock=clock, wanted=wanted)


def reopen(tmp_path: Path, clock: Clock, *folders: str) -> Repository:
    """The repository with the keys of these folders; with all of them unless some are named."""
    held = [signer for name in folders or ("keys", "offline") for signer in load(tmp_path / name)]
    return Repository.open(tmp_path / "served", held, clock=clock)


def of_hub(tmp_path: Path, clock: Clock) -> Repository:
    """The repository as the hub opens it."""
    return Repository.open(tmp_path / "served", tmp_path / "keys", clock=clock)


def key(tmp_path: Path, role: str) -> Path:
    """The file of the one key of a role."""
    (path,) = (*(tmp_path / "keys").glob(f"{role}-*.pem"), *(tmp_path / "offline").glob(f"{role}-*.pem"))
    return path


def key_in(folder: Path) -> Path:
    """The file of the one key in a folder."""
    (path,) = folder.iterdir()
    return path


def new_key(folder: Path, role: str) -> Obtained:
    return obtain("new", role, folder, secrets=Secrets(), variable=HUB_PASSPHRASE, passphrase=None)


def add(repository: Repository, content: bytes = b"model", **changes: Any) -> Release:
    details: dict[str, Any] = {"name": "digits", "model_digest": NEW, "guard_digest": GUARD, "replaces": None}
    return repository.add(content, **{**details, **changes})


def repair(repository: Repository, content: bytes = b"repaired", **changes: Any) -> Release:
    details: dict[str, Any] = {"name": "digits", "model_digest": NEW, "guard_digest": GUARD, "replaces": OLD}
    return repository.add_repair(content, **{**details, **changes})


def test_sequences_grow_from_one_and_survive_a_restart(tmp_path: Path, repository: Repository, clock: Clock) -> None:
    assert add(repository).sequence == 1
    assert add(repository, b"other", replaces=NEW).sequence == 2
    again = reopen(tmp_path, clock)
    assert add(again).sequence == 3
    assert [(release.target, release.replaces) for release in again.releases()] == [
        ("digits-1.tflite", None),
        ("digits-2.tflite", NEW),
        ("digits-3.tflite", None),
    ]


def test_files_lie_where_clients_with_consistent_snapshots_look(tmp_path: Path, repository: Repository) -> None:
    release = add(repository)
    served = tmp_path / "served"
    second = repair(repository, sidecar=b"inputs")
    assert sorted(str(path.relative_to(served)) for path in served.rglob("*") if path.is_file()) == [
        ".lock",
        "metadata/1.repaired.json",
        "metadata/1.root.json",
        "metadata/1.snapshot.json",
        "metadata/1.targets.json",
        "metadata/2.repaired.json",
        "metadata/2.snapshot.json",
        "metadata/2.targets.json",
        "metadata/3.snapshot.json",
        "metadata/timestamp.json",
        f"targets/{release.file_digest}.digits-1.tflite",
        f"targets/repaired/{sha256(b'inputs').hexdigest()}.digits-2.guard.npz",
        f"targets/repaired/{second.file_digest}.digits-2.tflite",
    ]
    assert repository.root() == (served / "metadata" / "1.root.json").read_bytes()


def test_private_keys_are_readable_by_their_owner_only_and_are_not_served(
    tmp_path: Path, repository: Repository
) -> None:
    add(repository)
    for folder, roles in (("keys", ["repaired", "snapshot", "timestamp"]), ("offline", ["root", "targets"])):
        files = sorted((tmp_path / folder).iterdir())
        assert [file.name.split("-")[0] for file in files] == roles
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
        assert (tmp_path / folder).stat().st_mode & 0o077 == 0
    served = b"".join(path.read_bytes() for path in (tmp_path / "served").rglob("*") if path.is_file())
    assert b"PRIVATE" not in served


@pytest.mark.parametrize("there", ["served", "keys", "offline"])
def test_a_repository_or_key_that_exists_is_not_overwritten(tmp_path: Path, clock: Clock, there: str) -> None:
    (tmp_path / there).mkdir()
    (tmp_path / there / "precious").write_text("x")
    with pytest.raises(ConfigError, match="already"):
        create(tmp_path, clock)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [there, f"{there}/precious"]


@pytest.mark.parametrize(
    ("folder", "keys", "offline", "reason"),
    [
        ("r", "r/keys", "o", "served"),
        ("r", "k", "r/offline", "served"),
        ("r", "r", "o", "served"),
        ("r/served", "r", "o", "served"),
        ("r", "k", "k", "the hub's"),
        ("r", "k", "k/offline", "the hub's"),
    ],
)
def test_keys_never_lie_in_the_folder_that_is_served_nor_offline_ones_with_the_hubs(
    tmp_path: Path, clock: Clock, folder: str, keys: str, offline: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        Repository.create(tmp_path / folder, tmp_path / keys, tmp_path / offline, clock=clock)
    assert not list(tmp_path.iterdir())


def test_a_disk_error_while_creating_leaves_nothing_half_written(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(100):
        folder = tmp_path / str(step)
        with monkeypatch.context() as patch:
            fail_from(patch, step)
            try:
                create(folder, clock)
            except ConfigError as error:
                assert "No space left" in str(error)
            else:
                assert step > 10
                return
        assert {path.name for path in folder.iterdir()} <= {"served", "keys", "offline"}
        for whole in folder.iterdir():
            assert len(list(whole.iterdir())) == {"served": 2, "keys": 3, "offline": 2}[whole.name]
    pytest.fail("creating takes too many steps")


def fail_from(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let every fsync and rename fail from the one numbered ``step`` on."""
    count = 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > step:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return call

    patch.setattr(os, "fsync", failing(os.fsync))
    patch.setattr(os, "replace", failing(os.replace))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../x"},
        {"name": ""},
        {"name": "Digits"},
        {"model_digest": "1" * 63},
        {"guard_digest": "x" * 64},
        {"replaces": ""},
        {"content": b""},
    ],
)
def test_a_bad_release_is_one_clear_line_and_publishes_nothing(
    tmp_path: Path, repository: Repository, changes: dict[str, Any]
) -> None:
    before = sorted((tmp_path / "served").rglob("*"))
    with pytest.raises(ConfigError) as error:
        add(repository, **changes)
    assert "\n" not in str(error.value)
    assert sorted((tmp_path / "served").rglob("*")) == before


def test_a_full_disk_publishes_nothing_and_the_next_release_works(
    tmp_path: Path, repository: Repository, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(repository)
    with monkeypatch.context() as patch:
        fail_from(patch, 4)
        with pytest.raises(ConfigError, match="No space left"):
            add(repository, b"second")
    assert len(repository.releases()) == len(reopen(tmp_path, clock).releases()) == 1
    assert not list((tmp_path / "served").rglob("*.tmp"))
    assert add(repository, b"second").sequence == 2
    assert reopen(tmp_path, clock).releases() == repository.releases()


def test_releases_from_several_threads_get_sequences_of_their_own(repository: Repository) -> None:
    with ThreadPoolExecutor(4) as pool:
        releases = list(pool.map(lambda number: add(repository, bytes([number])), range(8)))
    assert sorted(release.sequence for release in releases) == list(range(1, 9))
    assert len(repository.releases()) == 8


def test_no_repository_is_one_clear_line(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(ConfigError, match="none there"):
        Repository.open(tmp_path / "served", (), clock=clock)


@pytest.mark.parametrize(
    "name", ["1.root.json", "2.snapshot.json", "2.targets.json", "1.repaired.json", "timestamp.json"]
)
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-10],
        lambda content: content.replace(b'"expires":"20', b'"expires":"21'),
        lambda content: b"\xff",
        lambda content: b"{}",
    ],
    ids=["truncated", "later expiry", "not text", "empty object"],
)
def test_damaged_metadata_is_not_signed_on(
    tmp_path: Path, repository: Repository, clock: Clock, name: str, damage: Callable[[bytes], bytes]
) -> None:
    add(repository)
    path = tmp_path / "served" / "metadata" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TrustError, match=name) as error:
        reopen(tmp_path, clock)
    assert "\n" not in str(error.value)


def test_metadata_of_another_role_under_this_name_is_not_signed_on(
    tmp_path: Path, repository: Repository, clock: Clock
) -> None:
    metadata = tmp_path / "served" / "metadata"
    (metadata / "timestamp.json").write_bytes((metadata / "1.root.json").read_bytes())
    with pytest.raises(TrustError, match="of type root"):
        reopen(tmp_path, clock)


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_older_metadata_under_a_newer_name_is_not_signed_on(
    tmp_path: Path, repository: Repository, clock: Clock, role: str
) -> None:
    add(repository)
    metadata = tmp_path / "served" / "metadata"
    (metadata / f"2.{role}.json").write_bytes((metadata / f"1.{role}.json").read_bytes())
    with pytest.raises(TrustError, match=f"2.{role}.json"):
        reopen(tmp_path, clock)


def test_a_root_of_somebody_else_is_not_followed(tmp_path: Path, repository: Repository, clock: Clock) -> None:
    other = create(tmp_path / "other", clock)
    clock.now += timedelta(days=200)
    other.renew()
    (tmp_path / "served" / "metadata" / "2.root.json").write_bytes(
        (tmp_path / "other" / "served" / "metadata" / "2.root.json").read_bytes()
    )
    with pytest.raises(TrustError, match=r"2\.root\.json"):
        reopen(tmp_path, clock)


def test_a_root_that_does_not_count_on_is_not_followed(tmp_path: Path, repository: Repository, clock: Clock) -> None:
    (tmp_path / "served" / "metadata" / "2.root.json").write_bytes(repository.root())
    with pytest.raises(TrustError, match="of version 1"):
        reopen(tmp_path, clock)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda key: key.chmod(0o644), "chmod 600"),
        (lambda key: key.unlink(), "no key of snapshot"),
        (lambda key: key.write_bytes(b"x"), "PKCS8"),
        (lambda key: [path.unlink() for path in key.parent.iterdir()], "no keys there"),
        (lambda key: key.parent.rename(key.parent.with_name("moved")), "No such file"),
    ],
    ids=["readable by others", "missing", "not a key", "none", "no folder"],
)
def test_a_key_that_cannot_be_used_is_one_clear_line(
    tmp_path: Path, repository: Repository, clock: Clock, damage: Callable[[Path], object], message: str
) -> None:
    damage(key(tmp_path, "snapshot"))
    with pytest.raises(ConfigError, match=message):
        of_hub(tmp_path, clock)


def test_the_keys_of_another_repository_are_refused(tmp_path: Path, repository: Repository, clock: Clock) -> None:
    create(tmp_path / "other", clock)
    with pytest.raises(ConfigError, match="another repository"):
        Repository.open(tmp_path / "served", tmp_path / "other" / "keys", clock=clock)


def expiries(tmp_path: Path) -> dict[str, datetime]:
    """When the metadata that clients follow now expires, by role."""
    folder = tmp_path / "served" / "metadata"

    def newest(role: str) -> Path:
        return max(folder.glob(f"*.{role}.json"), key=lambda path: int(path.name.split(".")[0]))

    paths = {role: newest(role) for role in EXPIRES if role != "timestamp"} | {"timestamp": folder / "timestamp.json"}
    return {role: Metadata.from_bytes(path.read_bytes()).signed.expires for role, path in paths.items()}


def test_each_role_expires_after_its_own_time(tmp_path: Path, repository: Repository, clock: Clock) -> None:
    add(repository)
    assert expiries(tmp_path) == {role: clock.now + life for role, life in EXPIRES.items()}


def test_renewed_twice_a_day_nothing_ever_expires_and_little_is_written(tmp_path: Path, clock: Clock) -> None:
    life = {role: min(life, timedelta(days=40)) for role, life in EXPIRES.items()}
    repository = Repository.create(
        tmp_path / "served", tmp_path / "keys", tmp_path / "offline", clock=clock, expires=life
    )
    for _ in range(90):
        clock.now += timedelta(hours=20)
        repository.renew()
        assert min(expiries(tmp_path).values()) > clock.now + timedelta(hours=20)
    assert len(list((tmp_path / "served" / "metadata").iterdir())) < 40
    reopen(tmp_path, clock)


def test_an_expired_repository_can_be_opened_and_renewed(tmp_path: Path, repository: Repository, clock: Clock) -> None:
    clock.now += timedelta(days=1000)
    reopen(tmp_path, clock).renew()
    assert expiries(tmp_path) == {role: clock.now + life for role, life in EXPIRES.items()}


# --- who may sign what ------------------------------------------------------------------------------------------


def test_the_hub_signs_repairs_and_nothing_else(tmp_path: Path, repository: Repository, clock: Clock) -> None:
    hub = of_hub(tmp_path, clock)
    assert hub.held() == ("timestamp", "snapshot", "repaired")
    assert repair(hub).target == "repaired/digits-1.tflite"
    with pytest.raises(ConfigError, match=r"key of targets; got none at hand.*offline key folder"):
        add(hub)
    assert [release.target for release in hub.releases()] == ["repaired/digits-1.tflite"]


def test_the_hubs_key_is_trusted_for_the_repairs_paths_alone(tmp_path: Path, repository: Repository) -> None:
    targets: Metadata[Targets] = Metadata.from_bytes((tmp_path / "served/metadata/1.targets.json").read_bytes())
    assert targets.signed.delegations is not None
    (role,) = (targets.signed.delegations.roles or {}).values()
    assert (role.name, role.paths, role.terminating, role.threshold) == ("repaired", ["repaired/*"], True, 1)
    assert role.keyids == [load(key(tmp_path, "repaired"))[0].public_key.keyid]


def test_sequences_are_counted_over_offline_and_online_releases_together(repository: Repository) -> None:
    assert [add(repository).sequence, repair(repository).sequence, add(repository).sequence] == [1, 2, 3]


def test_the_same_repair_is_released_once(repository: Repository) -> None:
    assert repair(repository) == repair(repository)
    assert repair(repository, b"another").sequence == 2
    assert len(repository.releases()) == 2


def test_a_repair_is_released_anew_for_devices_that_went_back_to_the_model_before(repository: Repository) -> None:
    assert repair(repository).sequence == 1
    assert repair(repository, b"before", model_digest=OLD, replaces=NEW).sequence == 2
    assert repair(repository).sequence == 3
    assert repair(repository).sequence == 3


def test_what_a_release_is_for_is_signed_with_it(repository: Repository) -> None:
    release = repair(repository, boards=["raspberry pi 5*"], runtimes=["litert"])
    assert (release.boards, release.runtimes) == (("raspberry pi 5*",), ("litert",))
    assert repository.releases() == (release,)


def test_without_the_offline_keys_all_else_is_renewed(
    tmp_path: Path, repository: Repository, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    hub, before = of_hub(tmp_path, clock), expiries(tmp_path)
    clock.now += timedelta(days=300)
    hub.renew()
    after = expiries(tmp_path)
    assert {role for role in EXPIRES if after[role] == before[role]} == {"root", "targets"}
    assert after["timestamp"] == clock.now + EXPIRES["timestamp"]
    assert "root expires on 2031-01-01 and its key is not here" in caplog.text
    reopen(tmp_path, clock, "offline", "keys").renew()
    assert expiries(tmp_path) == {role: clock.now + life for role, life in EXPIRES.items()}


def test_status_says_what_expires_and_what_is_at_hand(tmp_path: Path, repository: Repository, clock: Clock) -> None:
    add(repository)
    status = of_hub(tmp_path, clock).status()
    assert (status.releases, status.sequence, status.warnings, status.drafts) == (1, 1, (), ())
    assert {role.role: role.at_hand for role in status.roles} == {
        "root": 0,
        "targets": 0,
        "repaired": 1,
        "snapshot": 1,
        "timestamp": 1,
    }
    clock.now += timedelta(days=3)
    assert repository.status().warnings == ("timestamp has expired on 2030-01-02: devices take no release",)


# --- thresholds, drafts and the second signature ----------------------------------------------------------------


def test_a_role_with_a_threshold_waits_in_a_draft_until_enough_have_signed(tmp_path: Path, clock: Clock) -> None:
    create(tmp_path, clock, targets=Wanted(names=("new", "new", "new"), threshold=2))
    first, second, _ = sorted((tmp_path / "offline").glob("targets-*.pem"))
    hub = load(tmp_path / "keys")
    alone = Repository.open(tmp_path / "served", (*hub, *load(first)), clock=clock)
    release = add(alone)
    assert (release.published, alone.releases()) == (False, ())
    (draft,) = alone.status().drafts
    assert (draft.role, draft.version, draft.signatures, draft.threshold) == ("targets", 2, 1, 2)
    assert draft.changes[1].startswith(f"adds digits-1.tflite: model {NEW}, guard {GUARD}")
    assert "a draft of targets waits for signatures" in alone.status().warnings
    with pytest.raises(ConfigError, match="draft of targets"):
        add(alone)
    with pytest.raises(ConfigError, match="has not signed already"):
        alone.sign()
    other = Repository.open(tmp_path / "served", (*hub, *load(second)), clock=clock)
    assert other.sign() == ("targets",)
    assert [one.target for one in other.releases()] == ["digits-1.tflite"]
    assert other.status().drafts == ()


def test_what_was_signed_without_the_hubs_keys_is_published_when_the_hub_renews(
    tmp_path: Path, repository: Repository, clock: Clock
) -> None:
    away = reopen(tmp_path, clock, "offline")
    assert not add(away).published
    hub = of_hub(tmp_path, clock)
    assert hub.releases() == ()
    assert hub.renew() == ("targets",)
    assert [release.sequence for release in hub.releases()] == [1]


def test_a_draft_whose_number_another_release_got_meanwhile_is_kept_and_not_published(
    tmp_path: Path, repository: Repository, clock: Clock
) -> None:
    served = tmp_path / "served"
    copied = shutil.copytree(served, tmp_path / "copied")
    add(Repository.open(copied, load(tmp_path / "offline"), clock=clock))
    hub = of_hub(tmp_path, clock)
    taken = repair(hub)
    shutil.copytree(copied / "drafts", served / "drafts")
    shutil.copytree(copied / "targets", served / "targets", dirs_exist_ok=True)
    assert hub.renew() == ()
    assert hub.releases() == (taken,)
    (warning,) = hub.status().warnings
    assert "its digits-1.tflite has the number of another release by now; discard it and add it anew" in warning
    repository.discard()
    assert add(repository).sequence == 2
    assert hub.status().warnings == ()


def test_a_draft_that_waits_for_a_second_person_is_published_though_repairs_were_meanwhile(
    tmp_path: Path, clock: Clock
) -> None:
    create(tmp_path, clock, targets=Wanted(names=("new", "new"), threshold=2))
    first, second = sorted((tmp_path / "offline").glob("targets-*.pem"))
    assert add(Repository.open(tmp_path / "served", load(first), clock=clock)).sequence == 1
    hub = of_hub(tmp_path, clock)
    assert repair(hub).sequence == 2
    Repository.open(tmp_path / "served", load(second), clock=clock).sign()
    assert hub.renew() == ("targets",)
    assert [release.sequence for release in hub.releases()] == [1, 2]


def test_a_repair_that_must_be_countersigned_is_published_by_nobody_alone(tmp_path: Path, clock: Clock) -> None:
    create(tmp_path, clock, **{COUNTERSIGN: Wanted(names=("new", "new"))})
    hub = of_hub(tmp_path, clock)
    assert not repair(hub).published
    hub.renew()
    assert (hub.releases(), repair(hub).published, repair(hub).sequence) == ((), False, 1)
    assert repair(hub, b"another").sequence == 2
    countersigner = min((tmp_path / "offline").glob("countersign-*.pem"))
    signing = Repository.open(tmp_path / "served", load(countersigner), clock=clock)
    assert signing.sign() == ()  # it has no key of snapshot and timestamp
    assert repair(hub).published
    assert [release.sequence for release in hub.releases()] == [1, 2]


def test_nothing_is_signed_but_what_was_shown(tmp_path: Path, clock: Clock) -> None:
    create(tmp_path, clock, **{COUNTERSIGN: Wanted(names=("new",))})
    hub = of_hub(tmp_path, clock)
    repair(hub)
    signing = reopen(tmp_path, clock)
    shown = signing.status().drafts
    repair(hub, b"slipped in while somebody reads")
    with pytest.raises(ConfigError, match="another one than was shown"):
        signing.sign(shown)
    assert signing.sign(signing.status().drafts) == ("repaired",)


def test_a_draft_that_none_of_the_roles_keys_signed_does_not_count(
    tmp_path: Path, repository: Repository, clock: Clock
) -> None:
    other = create(tmp_path / "other", clock)
    add(other)
    (tmp_path / "served/drafts").mkdir()
    content = (tmp_path / "other/served/metadata/2.targets.json").read_bytes()
    for planted in (content, content[:-20], b"\xff", b"[" * 100_000):
        (tmp_path / "served/drafts/targets.json").write_bytes(planted)
        assert repository.status().drafts == ()
        repository.renew()
    assert add(repository, b"genuine").sequence == 1
    assert len(repository.releases()) == 1


def test_a_draft_can_be_discarded(tmp_path: Path, repository: Repository, clock: Clock) -> None:
    away = reopen(tmp_path, clock, "offline")
    add(away)
    assert away.discard() == ("targets",)
    assert away.status().drafts == ()
    with pytest.raises(ConfigError, match="nothing to sign"):
        away.sign()


# --- rotation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "act"),
    [
        ("root", lambda repository: repository.rotate({"timestamp": [Obtained(key=SOME.public_key, signer=SOME)]})),
        ("targets", add),
        ("snapshot", Repository.renew),
        ("timestamp", Repository.renew),
    ],
)
def test_after_a_rotation_the_new_key_signs_and_the_old_one_no_more(
    tmp_path: Path, repository: Repository, clock: Clock, role: Any, act: Callable[[Repository], object]
) -> None:
    add(repository)
    old = key(tmp_path, role)
    assert repository.rotate({role: [new_key(old.parent, role)]})
    assert old.exists()
    old.rename(tmp_path / "old.pem")
    clock.now += timedelta(days=30)
    act(reopen(tmp_path, clock))
    key(tmp_path, role).unlink()
    (tmp_path / "old.pem").rename(old)
    clock.now += timedelta(days=30)
    before = (tmp_path / "served/metadata/timestamp.json").read_bytes()
    with pytest.raises(ConfigError, match="at hand"):
        act(reopen(tmp_path, clock))
    assert (tmp_path / "served/metadata/timestamp.json").read_bytes() == before


def test_a_hub_whose_keys_are_all_lost_gets_new_ones(tmp_path: Path, repository: Repository, clock: Clock) -> None:
    before = repair(repository)
    shutil.rmtree(tmp_path / "keys")
    operator = reopen(tmp_path, clock, "offline")
    keys = {role: new_key(tmp_path / "keys", role) for role in ("timestamp", "snapshot", "repaired")}
    assert operator.rotate({"timestamp": [keys["timestamp"]], "snapshot": [keys["snapshot"]]})
    assert operator.repair_key(keys["repaired"])
    hub = of_hub(tmp_path, clock)
    assert repair(hub, b"next").sequence == before.sequence + 1
    assert [release.sequence for release in hub.releases()] == [1, 2]


def test_a_rotation_can_raise_the_number_of_keys_that_must_sign(
    tmp_path: Path, repository: Repository, clock: Clock
) -> None:
    repository.rotate({"root": [new_key(tmp_path / "offline", "root") for _ in range(3)]}, thresholds={"root": 2})
    (root,) = (role for role in repository.status().roles if role.role == "root")
    assert (root.version, root.threshold, len(root.keys)) == (2, 2, 3)
    with pytest.raises(ConfigError, match="threshold of root; got 2; expected 1 to 1"):
        repository.rotate({"root": [new_key(tmp_path / "offline", "root")]})


def test_no_key_signs_both_online_and_offline(tmp_path: Path, repository: Repository) -> None:
    (targets,) = load(key(tmp_path, "targets"))
    own = Obtained(key=targets.public_key, signer=targets)
    with pytest.raises(ConfigError, match="a key of targets"):
        repository.rotate({"timestamp": [own]})
    with pytest.raises(ConfigError, match="a key of targets"):
        repository.repair_key(own)
    with pytest.raises(ConfigError, match="for countersign; got a key of targets"):
        repository.repair_key(new_key(tmp_path / "keys", "repaired"), countersigners=[own])


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "repaired"])
def test_the_second_signature_is_by_no_key_that_the_hub_holds(
    tmp_path: Path, repository: Repository, role: str
) -> None:
    (signer,) = load(key(tmp_path, role))
    hubs = Obtained(key=signer.public_key, signer=signer)
    with pytest.raises(ConfigError, match=f"for countersign; got a key of {role}"):
        repository.repair_key(new_key(tmp_path / "keys", "repaired"), countersigners=[hubs])
    countersigner = new_key(tmp_path / "offline", COUNTERSIGN)
    repository.repair_key(new_key(tmp_path / "keys", "repaired"), countersigners=[countersigner])
    with pytest.raises(ConfigError, match="for timestamp; got a key of countersign"):
        repository.rotate({"timestamp": [countersigner]})


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (("targets", COUNTERSIGN), "for countersign; got a key of targets"),
        (("snapshot", COUNTERSIGN), "a key of countersign|for countersign; got a key of snapshot"),
        (("repaired", COUNTERSIGN), "the hub's and a countersigner's"),
        (("root", "timestamp"), "a key of root"),
    ],
)
def test_a_new_repository_has_no_key_in_two_places(
    tmp_path: Path, clock: Clock, roles: tuple[str, str], reason: str
) -> None:
    new_key(tmp_path / "mine", "some")
    mine = Wanted(names=(str(key_in(tmp_path / "mine")),))
    with pytest.raises(ConfigError, match=reason):
        create(tmp_path, clock, **dict.fromkeys(roles, mine))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_countersigner_who_comes_twice_is_one_clear_line(tmp_path: Path, repository: Repository) -> None:
    one = new_key(tmp_path / "offline", COUNTERSIGN)
    with pytest.raises(ConfigError, match="2 times a countersigner's"):
        repository.repair_key(new_key(tmp_path / "keys", "repaired"), countersigners=[one, one])


def test_the_hubs_stolen_key_is_replaced_and_what_the_thief_signed_is_withdrawn_for_good(
    tmp_path: Path, repository: Repository, clock: Clock
) -> None:
    good, bad = repair(repository), repair(repository, b"a thief's")
    assert repository.repair_key(new_key(tmp_path / "keys", "repaired"), withdraw=[bad.sequence])
    assert repository.releases() == (good,)
    assert repair(repository, b"a thief's").sequence == bad.sequence + 1  # not the same number again
    assert len(repository.releases()) == 2


def test_a_draft_of_the_thief_is_not_published_under_the_new_key(
    tmp_path: Path, repository: Repository, clock: Clock
) -> None:
    away = reopen(tmp_path, clock, "offline")
    fresh = new_key(tmp_path / "keys", "repaired")
    away.repair_key(Obtained(key=fresh.key, signer=None))
    (stolen,) = (one for one in load(tmp_path / "keys") if one.public_key.keyid != fresh.key.keyid and
                 one.public_key.keyid in away.status().roles[2].keys)  # fmt: skip
    assert not repair(Repository.open(tmp_path / "served", [stolen], clock=clock), b"a thief's").published
    keys = [one for one in load(tmp_path / "keys") if one is not stolen]
    assert "targets" in Repository.open(tmp_path / "served", keys, clock=clock).renew()
    assert repository.releases() == ()


def test_countersigners_can_be_asked_for_later(tmp_path: Path, repository: Repository, clock: Clock) -> None:
    before = repair(repository)
    countersigner = new_key(tmp_path / "offline", COUNTERSIGN)
    assert repository.repair_key(new_key(tmp_path / "keys", "repaired"), countersigners=[countersigner])
    hub = of_hub(tmp_path, clock)
    assert not repair(hub, b"second").published
    assert repository.sign() == ("repaired",)
    assert [release.sequence for release in hub.releases()] == [before.sequence, 2]


@pytest.mark.parametrize("name", ["repaired/far-9.tflite", "far-9.tflite"])
def test_a_repair_with_a_number_that_no_device_would_take_is_passed_over(
    tmp_path: Path, repository: Repository, clock: Clock, name: str
) -> None:
    repair(repository)
    thief = Thief(tmp_path / "served", tmp_path / "stolen", stolen(tmp_path / "keys"))
    thief.list("repaired", name, sequence=2**53)
    thief.publish("repaired")
    operator = Repository.open(thief.folder, load(tmp_path / "keys"), clock=clock)
    assert repair(operator, b"next").sequence == 2


def test_the_number_of_an_offline_release_is_never_given_again_whatever_a_thief_takes_out_of_the_list(
    tmp_path: Path, repository: Repository, clock: Clock
) -> None:
    thief = Thief(tmp_path / "served", tmp_path / "stolen", stolen(tmp_path / "keys"))
    for sequence in (10_000, 20_000):
        thief.list("repaired", f"repaired/far-{sequence}.tflite", sequence=sequence)
    thief.publish("repaired")
    keys = [*load(tmp_path / "keys"), *load(tmp_path / "offline")]
    assert add(Repository.open(thief.folder, keys, clock=clock)).sequence == 20_001
    again = Thief(thief.folder, tmp_path / "again", stolen(tmp_path / "keys"))
    again.of("repaired").signed.targets.clear()
    again.publish("repaired")
    assert add(Repository.open(again.folder, keys, clock=clock), b"next").sequence == 20_002


def test_a_repository_of_one_key_a_role_is_refused_and_then_migrated(tmp_path: Path, clock: Clock) -> None:
    """As an earlier version made it: four keys in one folder, no delegation."""
    made = create(tmp_path, clock)
    (tmp_path / "offline").rename(tmp_path / "old")
    metadata = tmp_path / "served/metadata"
    for path in [*(tmp_path / "keys").iterdir()]:
        path.rename(tmp_path / "old" / path.name)
    signers = {path.name.split("-")[0]: load(path)[0] for path in (tmp_path / "old").iterdir()}
    roles: dict[str, Metadata[Any]] = {
        name: Metadata.from_bytes(next(metadata.glob(f"*{name}.json")).read_bytes())
        for name in ("targets", "snapshot", "timestamp")
    }
    roles["targets"].signed.delegations = None
    roles["snapshot"].signed.meta = {"targets.json": MetaFile(1)}
    roles["timestamp"].signed.snapshot_meta = MetaFile(1)
    for name, one in roles.items():
        one.sign(signers[name])
        next(metadata.glob(f"*{name}.json")).write_bytes(one.to_bytes())
    (metadata / "1.repaired.json").unlink()
    (tmp_path / "old").rename(tmp_path / "keys-of-hub")
    keys = tmp_path / "keys-of-hub"

    with pytest.raises(ConfigError, match=r"earlier version.*edgeguard release repair-key"):
        Repository.open(tmp_path / "served", keys, clock=clock)
    with pytest.raises(ConfigError, match="earlier version"):
        add(made)
    old = Repository.open(tmp_path / "served", load(keys), clock=clock)
    assert "earlier version" in old.status().warnings[0]
    assert old.repair_key(new_key(keys, "repaired"))
    assert repair(Repository.open(tmp_path / "served", keys, clock=clock)).sequence == 1


# --- a crash while a new root is published ----------------------------------------------------------------------


@pytest.mark.parametrize("role", ["timestamp", "targets"])
def test_a_crash_between_any_two_writes_of_a_rotation_leaves_a_repository_that_goes_on(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, role: Any
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # counted, not waited for
    add(create(tmp_path / "made", clock))
    for step in range(60):
        folder = shutil.copytree(tmp_path / "made", tmp_path / str(step))
        repository = reopen(folder, clock)
        old = key(folder, role)
        fresh = new_key(old.parent, role)
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            try:
                done = repository.rotate({role: [fresh]})
            except ConfigError:
                done = False
        load_roles(folder / "served/metadata")  # what is served fits together even before it is finished
        again = reopen(folder, clock)  # with the old key and the new one
        (now,) = (one for one in again.status().roles if one.role == role)
        rotated = now.keys == (fresh.key.keyid,)
        assert rotated or now.keys == (load(old)[0].public_key.keyid,)
        assert add(again).sequence == 2
        assert again.renew() == ()
        if done:
            assert rotated
            assert step > 10
            return
    pytest.fail("a rotation takes too many steps")
