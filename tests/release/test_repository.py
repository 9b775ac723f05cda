"""The hub's side of a release: what is signed, in which order it is written, and what is never overwritten."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata

from edgeguard.errors import ConfigError, TrustError
from edgeguard.release.repository import EXPIRES, Release, Repository

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
    return Repository.create(tmp_path / "served", tmp_path / "keys", clock=clock)


def reopen(tmp_path: Path, clock: Clock) -> Repository:
    return Repository.open(tmp_path / "served", tmp_path / "keys", clock=clock)


def add(repository: Repository, content: bytes = b"model", **changes: Any) -> Release:
    details: dict[str, Any] = {"name": "digits", "model_digest": NEW, "guard_digest": GUARD, "replaces": None}
    return repository.add(content, **{**details, **changes})


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
    assert sorted(str(path.relative_to(served)) for path in served.rglob("*") if path.is_file()) == [
        "metadata/1.root.json",
        "metadata/1.snapshot.json",
        "metadata/1.targets.json",
        "metadata/2.snapshot.json",
        "metadata/2.targets.json",
        "metadata/timestamp.json",
        f"targets/{release.file_digest}.digits-1.tflite",
    ]
    assert repository.root() == (served / "metadata" / "1.root.json").read_bytes()


def test_private_keys_are_readable_by_their_owner_only_and_are_not_served(
    tmp_path: Path, repository: Repository
) -> None:
    add(repository)
    keys = sorted((tmp_path / "keys").iterdir())
    assert [key.name for key in keys] == ["root.pem", "snapshot.pem", "targets.pem", "timestamp.pem"]
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}
    assert (tmp_path / "keys").stat().st_mode & 0o077 == 0
    served = b"".join(path.read_bytes() for path in (tmp_path / "served").rglob("*") if path.is_file())
    assert b"PRIVATE" not in served


@pytest.mark.parametrize("there", ["served", "keys"])
def test_a_repository_or_key_that_exists_is_not_overwritten(tmp_path: Path, clock: Clock, there: str) -> None:
    (tmp_path / there).mkdir()
    (tmp_path / there / "precious").write_text("x")
    with pytest.raises(ConfigError, match="already"):
        Repository.create(tmp_path / "served", tmp_path / "keys", clock=clock)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [there, f"{there}/precious"]


@pytest.mark.parametrize(("folder", "keys"), [("r", "r/keys"), ("r", "r"), ("r/served", "r")])
def test_keys_never_lie_in_the_folder_that_is_served(tmp_path: Path, clock: Clock, folder: str, keys: str) -> None:
    with pytest.raises(ConfigError, match="served"):
        Repository.create(tmp_path / folder, tmp_path / keys, clock=clock)


def test_a_disk_error_while_creating_leaves_nothing_half_written(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(100):
        folder = tmp_path / str(step)
        with monkeypatch.context() as patch:
            fail_from(patch, step)
            try:
                Repository.create(folder / "served", folder / "keys", clock=clock)
            except ConfigError as error:
                assert "No space left" in str(error)
            else:
                assert step > 10
                return
        assert {path.name for path in folder.iterdir()} <= {"served", "keys"}
        for whole in folder.iterdir():
            assert len(list(whole.iterdir())) == {"served": 2, "keys": 4}[whole.name]
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
        reopen(tmp_path, clock)


@pytest.mark.parametrize("name", ["1.root.json", "2.snapshot.json", "2.targets.json", "timestamp.json"])
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
    other = Repository.create(tmp_path / "other", tmp_path / "other-keys", clock=clock)
    clock.now += timedelta(days=200)
    other.renew()
    (tmp_path / "served" / "metadata" / "2.root.json").write_bytes(
        (tmp_path / "other" / "metadata" / "2.root.json").read_bytes()
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
        (lambda key: key.unlink(), "No such file"),
        (lambda key: key.write_bytes(b"x"), "PKCS8"),
        (lambda key: key.write_bytes((key.parent / "snapshot.pem").read_bytes()), "another repository"),
    ],
    ids=["readable by others", "missing", "not a key", "another role's"],
)
def test_a_key_that_cannot_be_used_is_one_clear_line(
    tmp_path: Path, repository: Repository, clock: Clock, damage: Callable[[Path], object], message: str
) -> None:
    damage(tmp_path / "keys" / "targets.pem")
    with pytest.raises(ConfigError, match=message):
        reopen(tmp_path, clock)


def expiries(tmp_path: Path) -> dict[str, datetime]:
    """When the metadata that clients follow now expires, by role."""
    folder = tmp_path / "served" / "metadata"

    def newest(role: str) -> Path:
        return max(folder.glob(f"*.{role}.json"), key=lambda path: int(path.name.split(".")[0]))

    paths = {role: newest(role) for role in ("root", "targets", "snapshot")} | {"timestamp": folder / "timestamp.json"}
    return {role: Metadata.from_bytes(path.read_bytes()).signed.expires for role, path in paths.items()}


def test_each_role_expires_after_its_own_time(tmp_path: Path, repository: Repository, clock: Clock) -> None:
    add(repository)
    assert expiries(tmp_path) == {role: clock.now + life for role, life in EXPIRES.items()}


def test_renewed_twice_a_day_nothing_ever_expires_and_little_is_written(
    tmp_path: Path, repository: Repository, clock: Clock
) -> None:
    for _ in range(450):
        clock.now += timedelta(hours=20)
        repository.renew()
        assert min(expiries(tmp_path).values()) > clock.now + timedelta(hours=20)
    assert len(list((tmp_path / "served" / "metadata").iterdir())) < 150
    reopen(tmp_path, clock)


def test_an_expired_repository_can_be_opened_and_renewed(tmp_path: Path, repository: Repository, clock: Clock) -> None:
    clock.now += timedelta(days=1000)
    reopen(tmp_path, clock).renew()
    assert expiries(tmp_path) == {role: clock.now + life for role, life in EXPIRES.items()}


def test_without_the_root_key_all_but_the_root_is_signed(
    tmp_path: Path, repository: Repository, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "keys" / "root.pem").rename(tmp_path / "offline.pem")
    again = reopen(tmp_path, clock)
    assert add(again).sequence == 1
    before = expiries(tmp_path)["root"]
    clock.now += timedelta(days=200)
    again.renew()
    assert expiries(tmp_path)["root"] == before
    assert expiries(tmp_path)["timestamp"] == clock.now + EXPIRES["timestamp"]
    assert "key is not here" in caplog.text
