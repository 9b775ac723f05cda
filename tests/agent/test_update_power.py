"""The kill table: whatever goes wrong at whatever file-system operation of an update, an approved model runs.

An update is told as lives of a device, each a state of it: the first start, the installation, the trial, its end. In
each life every operation fails once in every way that :mod:`tests.simulators.disk` knows; then the device starts again,
and again, on a disk that works. What must hold, at every start:

* what runs is whole, and was approved; nothing older than what ran before the update;
* what the device tells is what runs, and *updated* is told only of the release that runs;
* the update is not lost: in the end the release runs, confirmed; and one that failed its trial never does.

What a network computes is nothing to this: the models are stand-ins, whose files say who they are. How a release is
fetched has a table of its own, in ``tests/release/test_fetch_power.py``.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeguard.agent import config as configuration
from edgeguard.agent import startup
from edgeguard.agent.admission import Fetched
from edgeguard.agent.inference import Running
from edgeguard.agent.trial import STARTS, Fared, judge
from edgeguard.agent.update import clear, install
from edgeguard.contract.guard import Calibration, Detector, Environment, GuardMetadata, ModelInput, Tap
from edgeguard.detection import sidecar
from edgeguard.detection.guarded import Inference
from edgeguard.detection.sidecar import Sidecar
from edgeguard.detection.verdict import judge as verdict_of
from edgeguard.errors import ConfigError, EdgeGuardError, ModelError, TrustError
from firmware_bridge.slots import Slots
from tests.simulators import disk
from tests.simulators.disk import Fault

SHAPE = (2, 2, 1)
NEEDED = 4
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
            },
            base=self.folder,
        )

    @property
    def slots(self) -> Slots:
        return Slots(self.folder / "state" / "slots")

    def life(self) -> str:
        """One start: what the agent does with its disk until it stands, and what it would tell then."""
        config = self.config()
        state, running = startup.open_state(config)
        told = "running"
        for _ in range(3):  # a disk that failed once is asked again
            told, running = self._follow(state, running, config, told)
            running = self._try(state, running)
        state.lock.close()
        model: Any = running.model
        return f"{told} {model.number} {running.sequence}"

    def _follow(self, state: Any, running: Any, config: Any, told: str) -> tuple[str, Any]:
        offered = self.offered
        if offered is None:
            return told, running
        if offered == running.sequence:
            return "updated", running
        if digest(offered) in state.slots.failed:
            return "refused", running
        try:
            fetched = self._fetched(offered)
            successor = install(
                fetched,
                state.slots,
                trial=state.trial,
                load=state.load,
                anchor=None,
                sidecar_of=lambda found: startup.sidecar_of(config, found),
            )
        except (TrustError, ModelError):
            return "refused", running
        except (ConfigError, OSError):
            return "failed", running
        clear(fetched)
        return "updated", successor

    def _fetched(self, number: int) -> Fetched:
        """What the fetch child left: files that it verified."""
        staging = self.folder / "staging"
        staging.mkdir(exist_ok=True)
        path, beside = staging / "incoming.tflite", staging / "incoming.guard.npz"
        path.write_bytes(content(number))
        beside.write_bytes(companion(number))
        return Fetched(
            sequence=number,
            path=path,
            file_digest=digest(number),
            model_digest=f"{number:064x}",
            guard_digest="b" * 64,
            sidecar=beside,
            sidecar_digest=sidecar.digest(companion(number)),
        )

    def _try(self, state: Any, running: Any) -> Any:
        """The running model meets inputs."""
        if state.slots.confirmed or state.slots.active().sequence != running.sequence:
            return running
        fared = Fared(sick=NEEDED) if running.sequence == self.sick else Fared(healthy=NEEDED)
        try:
            if judge(fared, needed=NEEDED) == "revert":
                slot = state.slots.revert("it could not be scored", has_failed=True)
                model: Any = state.load(state.slots.read(slot))
                held = startup.sidecar_of(self.config(), model.metadata)
                return Running(model=model, sidecar=held, sequence=slot.sequence)
            state.slots.confirm()
            state.trial.end(running.model.file_digest)
            startup.tidy(state.slots, running.model.metadata)
        except EdgeGuardError:
            pass
        return running


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
    slots = device.slots
    fetched = device._fetched(3)
    starts = startup.trial(device.config())
    install(fetched, slots, trial=starts, load=StandIn, anchor=None, sidecar_of=lambda _: None)  # type: ignore[arg-type]
    device.offered = 3
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


LIVES = {
    "first start": Life(first, (1,), 1),
    "update": Life(an_update, (2, 3), 3),
    "trial": Life(on_trial, (2, 3), 3),
    "update during a trial": Life(an_update_during_a_trial, (2, 3, 4), 4),
    "update during a trial that fails": Life(an_update_during_a_failing_trial, (2, 3, 4), 4, failed=(3,)),
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
    for fault in disk.faults(passed):
        victim = copied(device, folder / "victim")
        said = one_life(victim, fault)
        row[fault.how] += 1
        check_end(victim, life, said, f"{fault} {passed[fault.at]}")


def copied(device: Device, folder: Path) -> Device:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(device.folder, folder, symlinks=True)
    return Device(folder, device.offered, device.sick)


def one_life(victim: Device, fault: Fault) -> str | None:
    """What it told; None where it was killed, or did not start: then systemd starts it again."""

    def life() -> str:
        try:
            return victim.life()
        except (EdgeGuardError, OSError):
            return ""

    return disk.run(life, victim.folder, fault).said or None


def check_end(victim: Device, life: Life, said: str | None, where: str) -> None:
    """What it said was true, and so is all that it says from now on, until the end that it must come to."""
    if said is not None:
        check_told(victim, life, said, where)
    for _ in range(STARTS + 2):
        check_told(victim, life, victim.life(), where)
        slots = victim.slots
        if slots.confirmed and slots.load() == content(life.end) and len(slots.failed) == len(life.failed):
            break
    check_told(victim, life, victim.life(), where)
    assert slots.load() == content(life.end), where
    assert slots.confirmed, where
    assert slots.failed == tuple(digest(number) for number in life.failed), where
    kept = {path.name for path in (victim.folder / "state" / "slots").iterdir()}
    used = {sidecar.digest(companion(number)) + sidecar.SUFFIX for number in RELEASES}
    assert sidecar.digest(companion(life.end)) + sidecar.SUFFIX in kept, where
    assert len(kept & used) <= 2, where
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
