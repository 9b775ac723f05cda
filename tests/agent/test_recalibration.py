"""The hub's ``recalibrate``: which data may be used, what the child may do to the agent, and what may run then."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from converters import calibration
from edgeguard import data as datasets
from edgeguard.agent.commands import INTERRUPTED, Outcome
from edgeguard.agent.config import RecalibrateConfig
from edgeguard.agent.recalibration import Calibrated, admit, clean_data
from edgeguard.contract import messages, topics
from edgeguard.contract.messages import Birth, Recalibrate, RecalibrateReply, Reported, decode, encode
from edgeguard.detection import sidecar
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import EdgeGuardError
from firmware_bridge.slots import RECORD, Slot, Slots
from tests.agent.conftest import Device
from tests.agent.test_update_process import Site
from tests.simulators.tiny_hub import TinyHub, wait_until

Make = Callable[..., Device]
Digits = npt.NDArray[np.uint8]
OWNERS = '[recalibrate]\ndata = "clean.npz"\n'


@pytest.fixture(scope="module")
def clean() -> Digits:
    """Clean inputs, ``uint8 [N, 8, 8, 1]``, none of which a device is fed."""
    return datasets.load("digits").x_train.astype(np.uint8)


@pytest.fixture(scope="module")
def made(digit_models: tuple[Path, Path], clean: Digits) -> calibration.Guarded:
    """The first model with a sidecar."""
    return calibration.recalibrate(digit_models[0].read_bytes(), clean[:200], sidecar=True)


class Asked:
    """One command of the hub's, and the replies to it."""

    _salts = itertools.count()

    def __init__(self, hub: TinyHub, source: str = "owner") -> None:
        self._hub = hub
        self.id = messages.transaction(time.time_ns() // 1_000_000, f"{next(self._salts):04x}")
        self._content = encode(msgspec.convert({"id": self.id, "source": source}, Recalibrate))
        self.send()

    def send(self) -> None:
        self._hub.send("camera-1", topics.command(Recalibrate.name), self._content)

    def replies(self) -> list[RecalibrateReply]:
        return [reply for raw in self._hub.replies if (reply := decode(RecalibrateReply, raw)).id == self.id]

    def reply(self, count: int = 1) -> RecalibrateReply:
        """The reply with this number."""
        wait_until(lambda: len(self.replies()) >= count, f"reply {count}", timeout_s=60)
        return self.replies()[count - 1]


def born(hub: TinyHub, camera: Device) -> Birth:
    """Start the agent; what it says it is."""
    births = len(hub.all(Birth))
    camera.start()
    wait_until(lambda: len(hub.all(Birth)) > births, "a birth")
    return hub.all(Birth)[-1]


def child_of(camera: Device) -> int:
    """The process that calibrates, once it has lowered its priority."""
    agent = camera.process().pid
    tasks = Path(f"/proc/{agent}/task")

    def children() -> list[int]:
        return [int(pid) for task in tasks.glob("*/children") for pid in task.read_text().split()]

    wait_until(children, "a child")
    (child,) = children()
    own = os.getpriority(os.PRIO_PROCESS, agent)
    wait_until(lambda: os.getpriority(os.PRIO_PROCESS, child) > own, "a low priority")
    return child


def test_the_owners_data_fits_the_guard_anew_while_the_device_goes_on(
    hub: TinyHub, device: Make, clean: Digits, digits: Digits, made: calibration.Guarded
) -> None:
    camera = device(more=OWNERS)
    camera.model = camera.folder / "m.guarded.tflite"
    camera.model.write_bytes(made.content)
    assert made.sidecar is not None
    (camera.folder / "m.guard.npz").write_bytes(made.sidecar)
    np.savez(camera.folder / "clean.npz", x=clean[200:500])
    before = born(hub, camera)
    assert "recalibrate" in before.capabilities
    asked = Asked(hub)
    first = asked.reply()
    assert first.result is not None and first.result.guard_digest is None
    child = child_of(camera)
    os.kill(child, signal.SIGSTOP)
    fed = camera.feed(digits[:64])
    wait_until(lambda: hub.inputs() == fed, "inputs that are run meanwhile")
    os.kill(child, signal.SIGCONT)
    last = asked.reply(2)
    assert last.result is not None, last.reason
    guard = last.result.guard_digest
    after, reported = hub.latest(Birth), hub.latest(Reported)
    assert after is not None and reported is not None
    assert (after.model_digest, after.guard_digest, after.sequence) == (before.model_digest, guard, before.sequence)
    assert guard != before.guard_digest and after.file_digest != before.file_digest
    assert "cascade" in after.capabilities, "the new guard has its own sidecar"
    assert (reported.guard_digest, reported.state) == (guard, "running")
    fed += camera.feed(digits[64:128])
    wait_until(lambda: hub.inputs() == fed, "inputs of the new guard")
    assert [report.guard_digest for report in hub.reports()] == [before.guard_digest, guard]
    wait_until(lambda: Slots(camera.folder / "state/slots").confirmed, "a filled window")
    camera.kill()
    again = born(hub, camera)
    assert (again.guard_digest, again.capabilities) == (guard, after.capabilities)
    assert Slots(camera.folder / "state/slots").active().parent == before.file_digest
    asked.send()
    assert asked.reply(3) == last
    assert camera.stop() == 0
    assert not (camera.folder / "state/recalibration").exists()


def test_a_child_that_refuses_or_is_killed_or_takes_too_long_leaves_the_old_model(
    hub: TinyHub, device: Make, clean: Digits
) -> None:
    camera = device(more=OWNERS)
    before = born(hub, camera)
    asked = Asked(hub)
    asked.reply()
    failed = asked.reply(2)
    assert (failed.state, failed.result) == ("failed", None)
    assert "clean.npz; got no such file" in failed.reason
    np.savez(camera.folder / "clean.npz", x=clean)
    asked = Asked(hub)
    asked.reply()
    child = child_of(camera)
    os.kill(child, signal.SIGSTOP)
    second = Asked(hub).reply()
    assert second.state == "refused" and "at work already" in second.reason
    os.kill(child, signal.SIGKILL)
    assert asked.reply(2).reason == "the re-calibration was ended by signal 9"
    assert camera.stop() == 0
    camera.more += "timeout_s = 0.05\n"
    assert born(hub, camera).file_digest == before.file_digest
    asked = Asked(hub)
    asked.reply()
    assert asked.reply(2).reason == "the re-calibration took too long"
    assert camera.stop() == 0
    assert {birth.file_digest for birth in hub.all(Birth)} == {before.file_digest}


def test_an_agent_that_is_killed_takes_its_child_along_and_runs_the_old_model_again(
    hub: TinyHub, device: Make, clean: Digits
) -> None:
    camera = device(more=OWNERS)
    np.savez(camera.folder / "clean.npz", x=clean)
    before = born(hub, camera)
    asked = Asked(hub)
    asked.reply()
    child = child_of(camera)
    os.kill(child, signal.SIGSTOP)
    camera.kill()
    wait_until(lambda: has_ended(child), "the end of the child")
    assert born(hub, camera).file_digest == before.file_digest
    asked.send()
    reply = asked.reply(2)
    assert (reply.state, reply.reason) == ("failed", INTERRUPTED)
    assert camera.stop() == 0


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_a_device_whose_owner_does_not_allow_it_refuses(hub: TinyHub, device: Make) -> None:
    camera = device()
    assert "recalibrate" not in born(hub, camera).capabilities
    reply = Asked(hub).reply()
    assert (reply.state, reply.result) == ("refused", None)
    assert "no [recalibrate] section" in reply.reason
    assert camera.stop() == 0


@pytest.fixture
def calibrated_device(device: Make, digit_models: tuple[Path, Path], made: calibration.Guarded) -> Device:
    """A device that re-calibrated its first model at an earlier time."""
    camera = device()
    slots = Slots.install(camera.folder / "state/slots", digit_models[0].read_bytes(), sequence=0)
    guard = made.metadata.guard_digest
    slots.activate(slots.stage_local(made.content, made_of=slots.active(), guard_digest=guard))
    slots.confirm()
    return camera


def test_a_forged_record_of_a_recalibration_falls_back_to_the_release(
    hub: TinyHub, calibrated_device: Device, digit_models: tuple[Path, Path], made: calibration.Guarded
) -> None:
    record = calibrated_device.folder / "state/slots" / RECORD
    record.write_text(record.read_text().replace(made.metadata.guard_digest, "f" * 64))
    first = GuardedModel.load(digit_models[0].read_bytes())
    assert born(hub, calibrated_device).file_digest == first.file_digest
    assert calibrated_device.stop() == 0


def test_a_signed_release_replaces_a_recalibrated_model(
    hub: TinyHub, calibrated_device: Device, digit_models: tuple[Path, Path], made: calibration.Guarded, tmp_path: Path
) -> None:
    site = Site(tmp_path)
    release = site.release(digit_models[1], digit_models[0])
    calibrated_device.more = site.config
    assert born(hub, calibrated_device).guard_digest == made.metadata.guard_digest
    hub.hint("camera-1", release.target, release.sequence)
    second = GuardedModel.load(digit_models[1].read_bytes())
    wait_until(lambda: hub.all(Birth)[-1].file_digest == second.file_digest, "the update")
    assert calibrated_device.stop() == 0
    site.close()


def held(made: calibration.Guarded) -> sidecar.Sidecar:
    assert made.sidecar is not None and made.metadata.sidecar_digest is not None
    return sidecar.decode(made.sidecar, digest=made.metadata.sidecar_digest, metadata=made.metadata)


@pytest.mark.parametrize(
    ("source", "there", "why"),
    [
        ("owner", True, "names no data"),
        ("sidecar", False, "no sidecar on this device"),
        ("sidecar", True, "19 clean inputs; 398 are needed for a false-positive rate of 0.01"),
    ],
)
def test_without_enough_clean_data_a_recalibration_is_refused(
    made: calibration.Guarded, source: str, there: bool, why: str
) -> None:
    metadata = msgspec.structs.replace(made.metadata, fpr=0.01)
    found = clean_data(source, RecalibrateConfig(), metadata, held(made) if there else None)  # type: ignore[arg-type]
    assert isinstance(found, Outcome)
    assert found.state == "refused" and why in found.reason


def test_a_sidecar_with_enough_inputs_for_its_rate_calibrates(made: calibration.Guarded) -> None:
    metadata, one = msgspec.structs.replace(made.metadata, fpr=0.5), held(made)
    found = clean_data("sidecar", RecalibrateConfig(data=Path("owner.npz")), metadata, one)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, np.concatenate([one.overlays, one.self_test]))


def calibrated(content: bytes, beside: bytes | None) -> Calibrated:
    slot = Slot(name="a", path=Path("slot-a.tflite"), sha256="0" * 64, sequence=1)
    return Calibrated(content=content, sidecar=beside, made_of=slot)


def test_what_a_child_wrote_must_be_the_running_model_and_pass_its_self_test(
    digit_models: tuple[Path, Path], made: calibration.Guarded
) -> None:
    running = GuardedModel.load(digit_models[0].read_bytes())
    right = calibrated(made.content, made.sidecar)
    assert admit(right, running, load=GuardedModel.load).metadata == made.metadata
    scaled = GuardedModel.load(digit_models[0].read_bytes())
    one = msgspec.structs.replace(running.metadata.input, range=(0.0, 1.0))
    scaled.metadata = msgspec.structs.replace(running.metadata, input=one)
    for done, against, why in (
        (calibrated(digit_models[1].read_bytes(), None), running, "model_digest"),
        (calibrated(b"no model", None), running, "model file"),
        (replace(right, sidecar=None), running, "SHA-256"),
        (right, scaled, "input range"),
        (calibrated(*with_other_answers(made)), running, "self-test"),
    ):
        with pytest.raises(EdgeGuardError, match=why):
            admit(done, against, load=GuardedModel.load)


def with_other_answers(made: calibration.Guarded) -> tuple[bytes, bytes]:
    """The file with a sidecar that expects other answers of the same model."""
    one = held(made)
    beside = sidecar.encode(replace(one, predicted=(one.predicted + 1) % 10))
    assert made.metadata.sidecar_digest is not None
    content = made.content.replace(made.metadata.sidecar_digest.encode(), sidecar.digest(beside).encode())
    return content, beside
