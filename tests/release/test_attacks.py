"""Attacks on the signed channel, by name: after each, what ran before is still running.

The names are those of the TUF specification, section 1.5.2, and of the fleet's own dangers. Repository, HTTP, client
and slots are the real ones; the attacker is simulated: a mirror that lies, a thief with keys, a writer of hints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal

import pytest

from edgeguard.agent.config import UpdateConfig
from edgeguard.agent.link import Hint
from edgeguard.agent.update import Updater
from edgeguard.contract.messages import Desired
from edgeguard.errors import TrustError
from edgeguard.release.client import FetchResult, spawn_fetch
from edgeguard.release.keys import HUB_PASSPHRASE, Secrets, obtain
from edgeguard.release.repository import COUNTERSIGN, EXPIRES, Repository, Wanted
from firmware_bridge.slots import Slots
from tests.simulators.release import (
    EVIL,
    GUARD,
    MODEL,
    NEW,
    OLD,
    OTHER,
    REPAIRED,
    Device,
    Mirror,
    Thief,
    stolen,
    unchanged,
)

ONLINE = ("timestamp", "snapshot", "repaired")


class World:
    """A repository, its mirror, and a device that runs the model OLD; a repair of it is released as number 1."""

    def __init__(self, folder: Path, *, expires: dict[str, timedelta] | None = None, **wanted: Wanted) -> None:
        self.served, self.keys, self.offline, self.folder = folder / "r", folder / "keys", folder / "offline", folder
        self.repository = Repository.create(
            self.served,
            self.keys,
            self.offline,
            clock=lambda: datetime.now(timezone.utc),
            expires={**EXPIRES, **(expires or {})},
            wanted=wanted,
        )
        self.first = self.release(REPAIRED)
        self.mirror = Mirror(self.served)
        self.device = Device(folder / "device", self.repository.root(), self.mirror)

    def release(self, content: bytes, *, model: str = NEW, replaces: str = OLD, **more: Any) -> str:
        """Release a repair as the hub does; its target's name."""
        return self.repository.add_repair(
            content, name="signs", model_digest=model, guard_digest=GUARD, replaces=replaces, **more
        ).target

    def thief(self, *roles: str, online: bool = False, offline: bool = False) -> Thief:
        """Somebody who has the keys of these roles, and whose copy is what the mirror serves from now on."""
        folders = [self.keys, self.offline] if roles else [*[self.keys] * online, *[self.offline] * offline]
        made = Thief(self.served, self.folder / f"copy{time.monotonic_ns()}", stolen(*folders, roles=roles or ("",)))
        self.mirror.folder = made.folder
        return made

    def updated(self) -> None:
        """Bring the device to the first release, by the genuine mirror."""
        assert self.device.follow(self.first, 1).state == "fetched"
        assert self.device.state.content == REPAIRED

    def new_key(self, role: str) -> Any:
        folder = self.keys if role in ONLINE else self.offline
        return obtain("new", role, folder, secrets=Secrets(), variable=HUB_PASSPHRASE, passphrase=None)


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Makes worlds, and stops their mirrors."""
    made: list[World] = []

    def make(**options: Any) -> World:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(World(folder, **options))
        return made[-1]

    yield make
    for world in made:
        world.mirror.close()


@pytest.fixture
def world(worlds: Callable[..., World]) -> World:
    return worlds()


def refused(result: FetchResult, *reasons: str) -> None:
    assert (result.state, result.path) == ("refused", None), result
    for reason in reasons:
        assert reason in result.reason


def test_without_an_attack_the_repair_arrives(world: World) -> None:
    world.updated()
    assert world.device.state.model_digest == NEW


class TestArbitraryPackage:
    """An attacker offers a model of their own."""

    def test_another_file_under_a_signed_name(self, world: World) -> None:
        (path,) = (world.served / "targets" / "repaired").iterdir()
        world.mirror.instead[f"targets/repaired/{path.name}"] = EVIL
        with unchanged(world.device):
            refused(world.device.follow(world.first, 1), "not the one that was signed")

    @pytest.mark.parametrize("keys", [(), ("timestamp",), ("timestamp", "snapshot")])
    @pytest.mark.parametrize(("role", "name"), [("targets", "evil-2.tflite"), ("repaired", "repaired/evil-2.tflite")])
    def test_a_listed_target_that_the_roles_own_key_did_not_sign(
        self, world: World, keys: tuple[str, ...], role: str, name: str
    ) -> None:
        thief = world.thief(*(keys or ("none",)))
        thief.list(role, name)
        thief.publish(role)
        with unchanged(world.device):
            refused(world.device.follow(name, 2), "not signed by the keys")


class TestRollback:
    """An attacker offers metadata that was good once."""

    def test_an_old_timestamp(self, world: World) -> None:
        old = (world.served / "metadata/timestamp.json").read_bytes()
        world.updated()
        world.release(EVIL, model=OTHER, replaces=NEW)
        world.device.follow("repaired/none.tflite", 9)  # it has seen the newer metadata
        world.mirror.instead["metadata/timestamp.json"] = old
        with unchanged(world.device):
            refused(world.device.follow("repaired/signs-2.tflite", 2), "older than what this device has seen")

    @pytest.mark.parametrize("role", ["targets", "repaired"])
    def test_an_old_list_under_a_fresh_snapshot_by_stolen_keys(self, world: World, role: str) -> None:
        thief = world.thief("timestamp", "snapshot")
        world.mirror.folder = world.served
        add = world.repository.add if role == "targets" else world.repository.add_repair
        add(EVIL, name="signs", model_digest=OTHER, guard_digest=GUARD, replaces=NEW)
        world.updated()
        world.mirror.folder = thief.folder
        thief.publish(version=50)
        with unchanged(world.device):
            refused(world.device.follow("repaired/signs-2.tflite", 2), f"Expected {role}.json version")


class TestFastForward:
    """An attacker moves numbers so far ahead that what is genuine can never follow."""

    def test_huge_versions_are_undone_by_new_keys(self, world: World) -> None:
        thief = world.thief("timestamp", "snapshot")
        thief.publish(version=2**31 - 1)
        with unchanged(world.device):
            world.device.follow("repaired/none.tflite", 9)
        world.mirror.folder = world.served
        with unchanged(world.device):
            refused(world.device.follow(world.first, 1), "older than what this device has seen")
        roles: tuple[Literal["snapshot", "timestamp"], ...] = ("snapshot", "timestamp")
        for role in roles:
            world.repository.rotate({role: [world.new_key(role)]})
        world.updated()

    def test_a_huge_sequence_is_not_taken_so_that_the_next_genuine_one_fits(self, world: World) -> None:
        thief = world.thief(online=True)
        thief.list("repaired", "repaired/far-1.tflite", sequence=2**53)
        thief.publish("repaired")
        with unchanged(world.device):
            refused(world.device.follow("repaired/far-1.tflite", 2**53), "at most 10000")

    def test_numbers_that_a_chain_of_repairs_used_up_are_undone_by_an_offline_release(self, world: World) -> None:
        """Each within reach of the one before it, and all of them beyond that of the device."""
        world.updated()
        thief = world.thief(online=True)
        far = (10_000, 20_000, 30_000)
        for sequence in far:
            thief.list("repaired", f"repaired/far-{sequence}.tflite", sequence=sequence, boards=["nothing"])
        thief.publish("repaired")
        keys = stolen(world.keys, world.offline)
        operator = Repository.open(thief.folder, keys, clock=lambda: datetime.now(timezone.utc))
        operator.repair_key(world.new_key("repaired"), withdraw=far)
        details: dict[str, Any] = {"name": "signs", "guard_digest": GUARD}
        repair = operator.add_repair(EVIL, model_digest=OTHER, replaces=NEW, **details)
        with unchanged(world.device):
            refused(world.device.follow(repair.target, repair.sequence), "at most 10001")
        offline = operator.add(MODEL, model_digest=OLD, replaces=NEW, **details)
        assert (repair.sequence, offline.sequence) == (30_001, 30_002)
        assert world.device.follow(offline.target, offline.sequence).state == "fetched"
        repair = operator.add_repair(REPAIRED, model_digest=NEW, replaces=OLD, **details)
        assert world.device.follow(repair.target, repair.sequence).state == "fetched"


class TestFreeze:
    """An attacker keeps a device on what it has."""

    def test_a_timestamp_that_is_never_renewed_expires(self, worlds: Callable[..., World]) -> None:
        world = worlds(expires={"timestamp": timedelta(seconds=3)})
        world.updated()
        frozen = (world.served / "metadata/timestamp.json").read_bytes()
        world.release(EVIL, model=OTHER, replaces=NEW)
        world.mirror.instead["metadata/timestamp.json"] = frozen
        with unchanged(world.device):
            refused(world.device.follow("repaired/signs-2.tflite", 2), "no such target")
            time.sleep(4)
            refused(world.device.follow("repaired/signs-2.tflite", 2), "expired")


class TestMixAndMatch:
    """An attacker combines metadata that never was one repository."""

    @pytest.mark.parametrize(("old", "new"), [("1.repaired", "3.repaired"), ("1.snapshot", "3.snapshot")])
    def test_old_metadata_under_a_new_name(self, world: World, old: str, new: str) -> None:
        world.release(EVIL, model=OTHER, replaces=NEW)
        metadata = world.served / "metadata"
        assert (metadata / f"{new}.json").exists()
        world.mirror.instead[f"metadata/{new}.json"] = (metadata / f"{old}.json").read_bytes()
        with unchanged(world.device):
            refused(world.device.follow(world.first, 1))

    def test_repairs_of_one_time_under_a_snapshot_of_another_by_a_stolen_timestamp_key(self, world: World) -> None:
        old = (world.served / "metadata/2.snapshot.json").read_bytes()
        world.release(EVIL, model=OTHER, replaces=NEW)
        thief = world.thief("timestamp")
        thief.publish()
        (thief.folder / "metadata" / f"{thief.of('snapshot').signed.version}.snapshot.json").write_bytes(old)
        with unchanged(world.device):
            refused(world.device.follow(world.first, 1), "Expected snapshot version")


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(4000):
        handler.wfile.write(bytes(64 * 1024))


@pytest.mark.parametrize("what", ["timestamp", "2.root", "2.snapshot", "1.targets", "2.repaired", "target"])
def test_endless_data_are_cut_off(world: World, what: str) -> None:
    (path,) = (world.served / "targets/repaired").iterdir()
    where = f"targets/repaired/{path.name}" if what == "target" else f"metadata/{what}.json"
    world.mirror.instead[where] = endless
    with unchanged(world.device):
        assert world.device.follow(world.first, 1).state in ("refused", "failed")
    assert sum(file.stat().st_size for file in world.device.folder.rglob("*") if file.is_file()) < 1 << 20


@pytest.mark.parametrize(
    "served",
    [REPAIRED[:-1] + b"x", REPAIRED + b"x", REPAIRED[:-1], b"", MODEL],
    ids=["wrong hash", "too long", "too short", "empty", "the model that runs"],
)
def test_a_wrong_hash_or_length_is_refused(world: World, served: bytes) -> None:
    (path,) = (world.served / "targets/repaired").iterdir()
    world.mirror.instead[f"targets/repaired/{path.name}"] = served
    with unchanged(world.device):
        refused(world.device.follow(world.first, 1))


class TestKeyCompromise:
    """An attacker holds keys: too few of a role, then enough."""

    @pytest.mark.parametrize("role", ["targets", "root"])
    def test_one_offline_key_where_two_must_sign(self, worlds: Callable[..., World], role: str) -> None:
        world = worlds(**{role: Wanted(names=("new", "new"), threshold=2)})
        one = min(world.offline.glob(f"{role}-*.pem"))
        thief = Thief(
            world.served, world.folder / "copy", [*stolen(world.keys), *stolen(one.parent, roles=(one.stem,))]
        )
        world.mirror.folder = thief.folder
        if role == "targets":
            thief.list("targets", "evil-2.tflite")
        thief.publish(role)
        with unchanged(world.device):
            refused(world.device.follow("evil-2.tflite", 2), f"{role} was signed by 1/2 keys")

    def test_all_keys_of_the_hub_where_a_repair_must_be_countersigned(self, worlds: Callable[..., World]) -> None:
        world = worlds(**{COUNTERSIGN: Wanted(names=("new",))})
        assert world.repository.releases()  # the genuine one has both signatures
        thief = world.thief(online=True)
        thief.list("repaired", "repaired/evil-2.tflite")
        thief.publish("repaired")
        with unchanged(world.device):
            refused(world.device.follow("repaired/evil-2.tflite", 2), "repaired was signed by 1/2 keys")

    @pytest.mark.parametrize(
        ("role", "name", "changes", "reason"),
        [
            ("targets", "evil-2.tflite", {}, "not signed by the keys"),
            ("repaired", "evil-2.tflite", {}, "no such target"),
            ("repaired", "repaired/more/evil-2.tflite", {}, "no such target"),
            ("repaired", "repaired/../evil-2.tflite", {}, "no way out of its folder"),
            ("repaired", "repaired/evil-2.tflite", {"replaces": None}, "replaces no model"),
            ("repaired", "repaired/evil-2.tflite", {"replaces": OTHER}, f"replaces {OTHER}"),
            ("repaired", "repaired/evil-2.tflite", {"sequence": 10_001}, "at most 10000"),
        ],
    )
    def test_all_keys_of_the_hub_sign_nothing_but_a_repair_of_what_runs(
        self, world: World, role: str, name: str, changes: dict[str, Any], reason: str
    ) -> None:
        thief = world.thief(online=True)
        thief.list(role, name, **changes)
        thief.publish(role)
        with unchanged(world.device):
            refused(world.device.follow(name, int(changes.get("sequence", 2))), reason)

    def test_the_hubs_keys_cannot_change_who_is_trusted(self, world: World) -> None:
        thief = world.thief(online=True)
        own = Thief(world.served, world.folder / "other")
        root = thief.of("root").signed
        for role in ("root", "targets"):
            root.add_key(own._own.public_key, role)
        thief.publish("root")
        with unchanged(world.device):
            refused(world.device.follow(world.first, 1), "root was signed by 0/1 keys")

    def test_all_keys_of_targets_are_of_no_use_once_the_root_has_replaced_them(self, world: World) -> None:
        thief = world.thief(online=True, offline=True)
        world.repository.rotate({"targets": [world.new_key("targets")]})
        genuine = {path.name: path.read_bytes() for path in (world.served / "metadata").glob("*.root.json")}
        for name, content in genuine.items():
            (thief.folder / "metadata" / name).write_bytes(content)
        thief.list("targets", "evil-2.tflite")
        thief.publish("targets")
        with unchanged(world.device):
            refused(world.device.follow("evil-2.tflite", 2), "targets was signed by 0/1 keys")


class TestRevokedKey:
    """An attacker uses a key that was replaced, and hides the news of it."""

    @pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp", "repaired"])
    def test_a_device_that_knows_does_not_forget(self, world: World, role: Any) -> None:
        taken = stolen(world.keys, world.offline, roles=tuple({role, *ONLINE}))
        if role == "repaired":
            world.repository.repair_key(world.new_key(role))
        else:
            world.repository.rotate({role: [world.new_key(role)]})
        world.updated()
        thief = Thief(world.served, world.folder / "copy", taken)
        (thief.folder / "metadata/2.root.json").unlink(missing_ok=True)
        world.mirror.folder = thief.folder
        name = "repaired/evil-2.tflite" if role == "repaired" else "evil-2.tflite"
        if role in ("targets", "repaired"):
            thief.list(role, name, replaces=NEW)
        thief.publish(*([role] if role in ("root", "targets", "repaired") else []))
        with unchanged(world.device):
            refused(world.device.follow(name, 2), f"{role} was signed by 0/1 keys")


class TestMaliciousMirror:
    """Whoever serves the files, or sits between, serves something else."""

    def test_a_whole_repository_of_somebody_else(self, worlds: Callable[..., World]) -> None:
        world, other = worlds(), worlds()
        world.mirror.folder = other.served
        with unchanged(world.device):
            refused(world.device.follow(world.first, 1), "not signed by the keys")

    @pytest.mark.parametrize("content", [None, b"", b"{}", b"<html>", b"\xff" * 100, b"[" * 10_000])
    @pytest.mark.parametrize("name", ["timestamp", "2.snapshot", "1.targets", "2.repaired"])
    def test_rubbish(self, world: World, name: str, content: bytes | None) -> None:
        world.mirror.instead[f"metadata/{name}.json"] = content
        with unchanged(world.device):
            assert world.device.follow(world.first, 1).state in ("refused", "failed")
        world.mirror.instead.clear()
        world.updated()  # and it does no harm that lasts

    def test_another_address(self, world: World) -> None:
        def redirect(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(302)
            handler.send_header("Location", f"{other.url}{handler.path}")
            handler.end_headers()

        other = Mirror(world.served)
        try:
            world.mirror.instead["metadata/timestamp.json"] = redirect
            with unchanged(world.device):
                result = world.device.follow(world.first, 1)
            assert (result.state, "302" in result.reason) == ("failed", True), result
        finally:
            other.close()


def test_a_downgrade_to_a_target_that_is_still_listed_is_refused(world: World) -> None:
    world.release(EVIL, model=OTHER, replaces=NEW)
    world.updated()
    assert world.device.follow("repaired/signs-2.tflite", 2).state == "fetched"
    with unchanged(world.device):
        refused(world.device.follow(world.first, 1), "expected more than 2")


def test_a_flood_of_hints_starts_few_fetches_and_the_genuine_one_gets_through(world: World) -> None:
    device, started = world.device, []
    config = UpdateConfig(
        metadata_url=f"{world.mirror.url}/metadata/",
        targets_url=f"{world.mirror.url}/targets/",
        root=device.folder / "root.json",
        retry_s=60.0,
    )

    def spawn(request: Any) -> Any:
        started.append(spawn_fetch(request))
        assert sum(child.poll() is None for child in started) == 1
        return started[-1]

    examined: list[Any] = []
    updater = Updater(config, device.folder / "update", examine=examined.append, spawn=spawn)  # type: ignore[arg-type]

    def step(now_s: float) -> Any:
        return updater.step(model_digest=OLD, running_sequence=0, now_s=now_s)

    with unchanged(device):
        for number in range(2000):
            desired = Desired(target=f"repaired/flood-{number}.tflite", sequence=number + 1)
            updater.hint(Hint(desired=desired, fresh=True), running_sequence=0, now_s=number / 100)
            step(number / 100)
        assert len(started) < 10  # in twenty seconds
        updater.hint(Hint(desired=Desired(target=world.first, sequence=1), fresh=True), running_sequence=0, now_s=40)
        deadline = time.monotonic() + 30
        while not examined and time.monotonic() < deadline:
            step(40)
            time.sleep(0.05)
    (fetched,) = examined
    assert fetched.model_digest == NEW
    updater._child = None


class TestHintForAnotherDevice:
    """A hint is genuine, and goes to a device that it is not meant for."""

    def test_one_that_runs_another_model(self, world: World) -> None:
        name = world.release(EVIL, model=NEW, replaces=OTHER)
        with unchanged(world.device):
            refused(world.device.follow(name, 2), f"a release that replaces {OTHER}")

    @pytest.mark.parametrize("only", [{"boards": ["NVIDIA Jetson*"]}, {"runtimes": ["tflite-runtime"]}])
    def test_another_board_or_runtime(self, world: World, only: dict[str, Any]) -> None:
        name = world.release(EVIL, **only)
        with unchanged(world.device):
            refused(world.device.follow(name, 2), "expected one of")

    def test_its_own_board_takes_it(self, world: World) -> None:
        name = world.release(EVIL, boards=["raspberry pi 5*", "x86_64"], runtimes=["LiteRT"])
        assert world.device.follow(name, 2).state == "fetched"


class TestTamperedSlot:
    """Somebody changes files on the device's disk."""

    def test_what_was_changed_between_check_and_staging_is_not_staged(self, world: World) -> None:
        from edgeguard.release.fetch import fetch

        result = fetch(world.device.request(world.first, 1))
        assert result.path is not None
        Path(result.path).write_bytes(EVIL)
        with unchanged(world.device), pytest.raises(TrustError):
            world.device.slots.stage(Path(result.path), sha256=str(result.file_digest), sequence=1)

    def test_a_changed_slot_that_does_not_run_is_never_gone_back_to(self, world: World) -> None:
        world.updated()
        previous = world.device.slots.previous()
        assert previous is not None
        previous.path.write_bytes(EVIL)
        with unchanged(world.device), pytest.raises(TrustError):
            Slots(world.device.folder / "slots").read(previous)

    def test_a_changed_slot_that_runs_is_not_loaded_again_and_the_one_before_still_is(self, world: World) -> None:
        world.updated()
        slots = Slots(world.device.folder / "slots")
        slots.active().path.write_bytes(EVIL)
        with pytest.raises(TrustError):
            slots.load()
        previous = slots.previous()
        assert previous is not None
        assert slots.read(previous) == MODEL
