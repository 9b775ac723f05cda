"""The kill table: whatever goes wrong at whatever file-system operation of an update, an approved model runs.

An update is told as lives of a device, each a state of it: the first start, the installation, the trial, its end. In
each life every operation fails once in every way that :mod:`tests.simulators.disk` knows; then the device starts again,
and again, on a disk that works. What must hold, at every start:

* what runs is whole, and was approved; nothing older than what ran before the update;
* what the device tells is what runs, and *updated* is told only of the release that runs;
* the update is not lost: in the end the release runs, confirmed; and one that failed its trial never does.

What runs is the agent's own code: its start, and what its reporter does with a hint, a trial and the slots. Simulated
are the two children, which answer at once; the inputs; and what a network computes, which is nothing to this: the
models are stand-ins, whose files say who they are. The hub is one that has a release for whatever a device runs. How a
release is fetched has a table of its own, in ``tests/release/test_fetch_power.py``.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeguard.agent import config as configuration
from edgeguard.agent import startup
from edgeguard.agent.admission import Answer
from edgeguard.agent.link import Hint
from edgeguard.agent.succession import Succession
from edgeguard.agent.trial import STARTS, Fared
from edgeguard.contract.guard import Calibration, Detector, Environment, GuardMetadata, ModelInput, Tap
from edgeguard.contract.messages import Desired
from edgeguard.detection import sidecar
from edgeguard.detection.guarded import Inference
from edgeguard.detection.sidecar import Sidecar
from edgeguard.detection.verdict import judge as verdict_of
from edgeguard.errors import ConfigError, EdgeGuardError, ModelError, TrustError
from edgeguard.release.client import CUSTOM, FetchRequest, FetchResult, check_target
from firmware_bridge.slots import Slot, Slots
from tests.simulators import disk
from tests.simulators.disk import Fault

SHAPE = (2, 2, 1)
NEEDED = 4
TURNS = 10
"""What the reporter does in a life: enough for an update, an attempt at it that failed before, and a trial."""
RELEASES = (1, 2, 3, 4)


@functools.cache
def companion(number: int) -> bytes:
    """The sidecar of a release."""
    inputs = np.full((3, *SHAPE), number, np.uint8)
    return sidecar.encode(
        Sidecar(
            overlays=inputs,
            self_test=inputs,
            predicted=np.zeros(3, np.int64),
            scores=np.full((3, 1), 0.5, np.float32),
            stages={},
        )
    )


@functools.cache
def content(number: int) -> bytes:
    """The file of a release."""
    return msgspec.json.encode({"number": number, "sidecar": sidecar.digest(companion(number))}) * 20


@functools.cache
def digest(number: int) -> str:
    return hashlib.sha256(content(number)).hexdigest()


class StandIn:
    """What is loaded from such a file."""

    runtime = SimpleNamespace(name="litert")

    def __init__(self, read: bytes) -> None:
        numbers = [number for number in RELEASES if content(number) == read]
        if not numbers:
            raise ModelError("model file", got="damaged")
        (self.number,) = numbers
        self.file_digest = hashlib.sha256(read).hexdigest()
        self.metadata = GuardMetadata(
            model_digest=f"{self.number:064x}",
            guard_digest="b" * 64,
            detectors=(Detector(name="linf", threshold=2.0),),
            taps=(Tap(tensor="t", source_layer="", kind="linf", offset=0, channels=4),),
            class_output=0,
            classes=("a", "b"),
            input=ModelInput(shape=SHAPE, dtype="uint8", range=(0.0, 255.0)),
            fpr=0.01,
            fpr_upper=(0.02, 0.02),
            score_to_p=((1.0, 0.01),),
            calibration=Calibration(n_fit=200, n_threshold=200, digest="c" * 64),
            environment=Environment(runtime="litert", version="2", threads=1, cpu="x"),
            sidecar_digest=sidecar.digest(companion(self.number)),
        )

    def infer(self, _x: Any) -> Inference:
        return Inference((), np.zeros(4, np.float32), verdict_of(0, {"linf": 0.5}, self.metadata.score_to_p))


@dataclass
class Device:
    """One device: its folder, and what the hub offers it."""

    folder: Path
    offered: int | None = None
    sick: int | None = None
    """The release that fails on real inputs."""
    idle: tuple[int, ...] = ()
    """The releases that meet no inputs."""

    def config(self) -> configuration.AgentConfig:
        return configuration.parse(
            {
                "fleet": "f",
                "device": "d",
                "model": "first.tflite",
                "sequence": 1,
                "state_dir": "state",
                "broker": {"host": "127.0.0.1"},
                "sources": {"folder": {"path": "inbox"}},
                "update": {
                    "metadata_url": "http://hub/metadata",
                    "targets_url": "http://hub/targets",
                    "root": "root.json",
                    "trial_inputs": NEEDED,
                },
            },
            base=self.folder,
        )

    @property
    def slots(self) -> Slots:
        return Slots(self.folder / "state" / "slots")

    def life(self) -> str:
        """One start: what the agent does with its disk until it stands, and what it tells then."""
        state, models = self.start()
        if self.offered is not None:
            models.hint(Hint(Desired(target=f"m-{self.offered}.tflite", sequence=self.offered), fresh=True), now_s=0.0)
        for turn in range(TURNS):
            models.step(now_s=turn * 1e6)  # what failed is tried again in the next turn
            successor = models.successor()
            if successor is not None:
                models.swapped(successor)
            elif models.running.sequence not in self.idle:
                ill = models.running.sequence == self.sick
                models.prove(Fared(sick=NEEDED) if ill else Fared(healthy=NEEDED))
        models.close()
        state.lock.close()
        running: Any = models.running.model
        return f"{models.told.state if models.told else 'running'} {running.number} {models.running.sequence}"

    def start(self) -> tuple[startup.State, Succession]:
        """The agent's state, opened, and what its reporter keeps of its models."""
        config = self.config()
        state, running = startup.open_state(config)
        return state, Succession(config, state, running, spawn=self._fetch, ask=_admitted)

    def _fetch(self, request: FetchRequest) -> Any:
        """What the fetch child would do, but for signatures and the network."""
        number = request.sequence
        custom = {
            "sequence": number,
            "model_digest": f"{number:064x}",
            "guard_digest": "b" * 64,
            "replaces": request.running_model_digest,
        }
        try:
            check_target({CUSTOM: custom}, request.hint, request.running)
        except TrustError as error:
            return ended(FetchResult(state="refused", reason=str(error)))
        if digest(number) in request.failed:
            return ended(FetchResult(state="refused", reason="it failed here"))
        staging = self.folder / "staging"
        path, beside = staging / "incoming.tflite", staging / "incoming.guard.npz"
        try:
            staging.mkdir(exist_ok=True)
            path.write_bytes(content(number))
            beside.write_bytes(companion(number))
        except OSError as error:
            return ended(FetchResult(state="failed", reason=str(error)))
        return ended(
            FetchResult(
                state="fetched",
                path=str(path),
                file_digest=digest(number),
                sequence=number,
                model_digest=f"{number:064x}",
                guard_digest="b" * 64,
                sidecar_path=str(beside),
                sidecar_digest=sidecar.digest(companion(number)),
            )
        )


def _admitted(*_: object) -> Any:
    """The child that checks what was fetched has nothing against it."""
    return ended(Answer(state="admitted"))


class ended:  # noqa: N801 - called like the function that starts a process
    """A child process that has answered."""

    def __init__(self, answer: FetchResult | Answer) -> None:
        self.stdout = io.BytesIO(msgspec.json.encode(answer))

    def poll(self) -> int:
        return 0

    def kill(self) -> None:
        """It has ended."""

    communicate = kill

    def __enter__(self) -> ended:
        return self

    def __exit__(self, *why: object) -> None:
        """Nothing is left of it."""


# The lives of a device. Each makes the state that it begins with, and says what must run in the end.


def installed(folder: Path) -> Device:
    """It runs release 2, confirmed, and came from 1: both slots are taken."""
    device = Device(folder)
    (folder / "first.tflite").write_bytes(content(1))
    sidecar.path_beside(folder / "first.tflite").write_bytes(companion(1))
    assert device.life() == "running 1 1"
    device.offered = 2
    assert device.life() == "updated 2 2"
    assert device.slots.confirmed
    return device


def on_trial(folder: Path) -> Device:
    """Release 3 was put in place and has met no input yet."""
    device = installed(folder)
    device.offered, device.idle = 3, (3,)
    assert device.life() == "updated 3 3"
    assert not device.slots.confirmed
    device.idle = ()
    return device


def first(folder: Path) -> Device:
    (folder / "first.tflite").write_bytes(content(1))
    sidecar.path_beside(folder / "first.tflite").write_bytes(companion(1))
    return Device(folder)


def an_update(folder: Path) -> Device:
    device = installed(folder)
    device.offered = 3
    return device


def a_failing_release(folder: Path) -> Device:
    device = an_update(folder)
    device.sick = 3
    return device


def a_failing_trial(folder: Path) -> Device:
    device = on_trial(folder)
    device.sick = 3
    return device


def an_update_during_a_trial(folder: Path) -> Device:
    device = on_trial(folder)
    device.offered = 4
    return device


def an_update_instead_of_one_on_trial(folder: Path) -> Device:
    """The release on trial meets no input, so that its trial does not end."""
    device = an_update_during_a_trial(folder)
    device.idle = (3,)
    return device


def a_failing_update_instead_of_one_on_trial(folder: Path) -> Device:
    """What takes the place of the one on trial fails: the last that proved itself runs again."""
    device = an_update_instead_of_one_on_trial(folder)
    device.sick = 4
    return device


def an_update_without_any_input(folder: Path) -> Device:
    """Neither trial ends: the newest release runs, and the way back stays open."""
    device = an_update_instead_of_one_on_trial(folder)
    device.idle = (3, 4)
    return device


def an_update_during_a_failing_trial(folder: Path) -> Device:
    device = an_update_during_a_trial(folder)
    device.sick = 3
    return device


def an_update_that_fails_after_a_failing_trial(folder: Path) -> Device:
    """Both new releases are bad: the way back must have stayed open all the time."""
    device = an_update_during_a_failing_trial(folder)
    device.sick = 4
    device.slots.revert("it could not be scored", has_failed=True)
    return device


def crashes(folder: Path) -> Device:
    """It crashed as often as it may: each start is counted, and none was followed by a confirmation."""
    device = a_failing_trial(folder)
    starts = startup.trial(device.config())
    for _ in range(STARTS - 1):  # the first was that in which the agent took it
        starts.begin(digest(3))
    return device


def a_damaged_trial(folder: Path) -> Device:
    device = on_trial(folder)
    device.slots.active().path.write_bytes(b"damaged")
    return device


@dataclass(frozen=True)
class Life:
    make: Callable[[Path], Device]
    may_run: tuple[int, ...]
    """Releases that may run at any time from then on."""
    end: int
    failed: tuple[int, ...] = ()
    """Releases that have failed for good in the end."""
    or_replaced: bool = False
    """The failing one may have been replaced before that was found out, as where the disk did not take the verdict."""
    way_back: int | None = None
    """The release that may still run again, where the last one has not proved itself in the end."""

    def failures(self) -> list[tuple[str, ...]]:
        """What may be remembered as failed in the end."""
        return [tuple(digest(number) for number in self.failed), *([()] if self.or_replaced else [])]


LIVES = {
    "first start": Life(first, (1,), 1),
    "update": Life(an_update, (2, 3), 3),
    "trial": Life(on_trial, (2, 3), 3),
    "update during a trial": Life(an_update_during_a_trial, (2, 3, 4), 4),
    "update instead of one on trial": Life(an_update_instead_of_one_on_trial, (2, 3, 4), 4),
    "the same, and it fails": Life(a_failing_update_instead_of_one_on_trial, (2, 3, 4), 2, failed=(4,)),
    "the same without any input": Life(an_update_without_any_input, (2, 3, 4), 4, way_back=2),
    "update during a trial that fails": Life(
        an_update_during_a_failing_trial, (2, 3, 4), 4, failed=(3,), or_replaced=True
    ),
    "update that fails after a failed one": Life(an_update_that_fails_after_a_failing_trial, (2, 4), 2, failed=(3, 4)),
    "update to a release that fails": Life(a_failing_release, (2, 3), 2, failed=(3,)),
    "trial of a release that fails": Life(a_failing_trial, (2, 3), 2, failed=(3,)),
    "start after crashes": Life(crashes, (2, 3), 2, failed=(3,)),
    "start on a damaged slot": Life(a_damaged_trial, (2, 3), 3),
}


@dataclass
class Points:
    """What was tried, for the table at the end."""

    table: dict[str, Counter[str]] = field(default_factory=dict)

    def print(self) -> None:
        print(f"\n{'state of an update':<34}{'operations':>11}{'error in':>10}{'killed in':>11}{'power lost in':>15}")
        total: Counter[str] = Counter()
        for name, row in self.table.items():
            total += row
            print(f"{name:<34}{row['points']:>11}{row['error']:>10}{row['kill']:>11}{row['power']:>15}")
        print(f"{'together':<34}{total['points']:>11}{total['error']:>10}{total['kill']:>11}{total['power']:>15}")


@pytest.fixture(scope="module")
def points(request: pytest.FixtureRequest) -> Iterator[Points]:
    found = Points()
    yield found
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        found.print()


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a folder: what a sync does is simulated."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "loader", lambda _: StandIn)


@pytest.mark.parametrize("name", LIVES)
def test_whatever_fails_wherever_an_approved_model_runs_and_the_update_is_not_lost(
    name: str, folder: Path, points: Points
) -> None:
    life = LIVES[name]
    pristine = folder / "pristine"
    pristine.mkdir()
    device = life.make(pristine)
    whole = copied(device, folder / "whole")
    passed = disk.run(whole.life, whole.folder).points
    row = points.table[name] = Counter(points=len(passed))
    assert len(passed) > 5
    followed = set()
    for fault in disk.faults(passed):
        victim, where = copied(device, folder / "victim"), f"{fault} {passed[fault.at]}"
        said = one_life(victim, fault)
        row[fault.how] += 1
        if said is not None:
            check_told(victim, life, said, where)
        left = on_disk(victim.folder)
        if left not in followed:  # what comes next depends on nothing else
            followed.add(left)
            check_end(victim, life, where)


@pytest.mark.parametrize(
    ("make", "after", "told"),
    [
        (an_update, "rename to trial.json", "updated 3 3"),
        (an_update_instead_of_one_on_trial, "rename to slot-c.tflite", "updated 4 4"),
        (a_failing_trial, "rename to trial.json", "refused 2 2"),
    ],
    ids=["activation", "activation instead of one on trial", "way back"],
)
def test_a_change_of_the_record_that_the_disk_made_but_did_not_confirm_is_followed_within_the_same_life(
    make: Callable[[Path], Device], after: str, told: str, folder: Path
) -> None:
    (folder / "pristine").mkdir()
    whole = make(folder / "pristine")
    passed = disk.run(copied(whole, folder / "whole").life, folder / "whole").points
    renamed = passed.index("rename to slots.json", passed.index("rename to trial.json", passed.index(after)))
    assert passed[renamed + 1] == "sync slots"
    victim = copied(whole, folder / "victim")
    assert disk.run(victim.life, victim.folder, Fault(renamed + 1, "error")).said == told


class Killed(BaseException):
    """The process is gone."""


def test_a_model_that_kills_the_agent_when_it_is_first_run_is_counted_and_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = an_update(folder)
    harmless = StandIn.infer

    def infer(self: StandIn, x: Any) -> Inference:
        if self.number == 3:
            raise Killed
        return harmless(self, x)

    monkeypatch.setattr(StandIn, "infer", infer)
    for _ in range(STARTS):
        with pytest.raises(Killed):
            device.life()
    assert device.life() == "refused 2 2"
    assert device.slots.failed == (digest(3),)


def test_a_model_that_cannot_be_run_is_left_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = an_update(folder)
    harmless = StandIn.infer

    def infer(self: StandIn, x: Any) -> Inference:
        if self.number == 3:
            raise ModelError("model", got="a failure of the runtime")
        return harmless(self, x)

    monkeypatch.setattr(StandIn, "infer", infer)
    assert device.life() == "refused 2 2"
    assert (device.slots.confirmed, device.slots.failed) == (True, (digest(3),))


def test_what_the_disk_put_in_place_though_it_said_no_is_taken_without_another_hint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = an_update(folder)
    state, models = device.start()
    activate = Slots.activate

    def unsure(self: Slots, slot: Slot) -> None:
        activate(self, slot)
        raise ConfigError("model slots", got="input/output error")

    monkeypatch.setattr(Slots, "activate", unsure)
    models.hint(Hint(Desired(target="m-3.tflite", sequence=3), fresh=True), now_s=0.0)
    for turn in range(TURNS):
        models.step(now_s=float(turn))
    assert models.told is not None
    assert models.told.state == "failed"
    models.prove(Fared(healthy=NEEDED))
    successor = models.successor()
    assert successor is not None
    models.swapped(successor)
    assert (models.running.sequence, models.told.state) == (3, "updated")
    models.close()
    state.lock.close()


def copied(device: Device, folder: Path) -> Device:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(device.folder, folder, symlinks=True)
    return replace(device, folder=folder)


def one_life(victim: Device, fault: Fault) -> str | None:
    """What it told; None where it was killed, or did not start: then systemd starts it again."""

    def life() -> str:
        try:
            return victim.life()
        except (EdgeGuardError, OSError):
            return ""

    return disk.run(life, victim.folder, fault).said or None


def on_disk(folder: Path) -> tuple[tuple[str, bytes], ...]:
    """All files."""
    return tuple(sorted((str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file()))


def check_end(victim: Device, life: Life, where: str) -> None:
    """All that it says from now on is true, until the end that it must come to."""
    for _ in range(STARTS + 2):
        check_told(victim, life, victim.life(), where)
        slots = victim.slots
        proved = slots.confirmed == (life.way_back is None)
        if proved and slots.load() == content(life.end) and slots.failed in life.failures():
            break
    check_told(victim, life, victim.life(), where)
    assert slots.load() == content(life.end), where
    if life.way_back is None:
        assert slots.confirmed, where
    else:
        before = slots.previous()
        assert before is not None, where
        assert slots.read(before) == content(life.way_back), where
    assert slots.failed in life.failures(), where
    kept = {path.name for path in (victim.folder / "state" / "slots").iterdir()}
    used = {sidecar.digest(companion(number)) + sidecar.SUFFIX for number in RELEASES}
    assert sidecar.digest(companion(life.end)) + sidecar.SUFFIX in kept, where
    assert len(kept & used) <= 2 + (life.way_back is not None), where
    assert not [name for name in kept if name.endswith(".tmp")], where


def check_told(victim: Device, life: Life, said: str, where: str) -> None:
    state, number, sequence = said.split()
    assert number == sequence, where
    assert int(number) in life.may_run, where
    assert (state == "updated") == (int(number) == victim.offered), where
    slots = victim.slots
    assert slots.load() in [content(release) for release in life.may_run], where
    assert slots.active().sequence >= min(life.may_run), where


def test_the_table_sees_an_operation_that_is_not_safe(tmp_path: Path) -> None:
    # The table must be able to fail: a file that is written in place does not survive a power cut.
    path = tmp_path / "disk" / "file"
    path.parent.mkdir()
    path.write_bytes(b"old")

    def careless() -> str:
        path.write_bytes(b"newer")
        path.with_name("after").write_bytes(b"x")
        return "done"

    passed = disk.run(careless, path.parent).points
    assert passed == ["open to write file", "write file", "open to write after", "write after"]
    path.write_bytes(b"old")
    disk.run(careless, path.parent, Fault(2, "power"))
    assert path.read_bytes() not in (b"old", b"newer")
