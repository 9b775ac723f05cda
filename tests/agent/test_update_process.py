"""Updates the whole way: a signed repository over HTTP, a fetch child, a running agent.

Mostly the agent is a process of its own. Where a test must see which thread opens and runs which model, it is one in
this process, with its loop in a thread.
"""

from __future__ import annotations

import functools
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeguard.agent import config as configuration
from edgeguard.agent import startup
from edgeguard.agent.daemon import Agent
from edgeguard.contract import frames
from edgeguard.contract.messages import Birth, Reported
from edgeguard.detection import metadata as metadata_reader
from edgeguard.detection import sidecar
from edgeguard.detection.guarded import GuardedModel
from edgeguard.detection.sidecar import Sidecar
from edgeguard.errors import ModelError
from edgeguard.release.repository import Repository
from edgeguard.release.roles import Release
from firmware_bridge.slots import Slots
from tests.agent.conftest import Device
from tests.simulators.tiny_hub import TinyHub, wait_until

Make = Callable[..., Device]
Digits = npt.NDArray[np.uint8]


class Site:
    """A repository that signs and serves the second model; ``served`` is its folder."""

    def __init__(self, folder: Path) -> None:
        self.served = folder / "served"
        self.repository = Repository.create(
            self.served, folder / "keys", folder / "offline", clock=lambda: datetime.now(timezone.utc)
        )
        (folder / "root.json").write_bytes(self.repository.root())
        handler = functools.partial(_Quiet, directory=str(self.served))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.config = (
            f'[update]\nmetadata_url = "{url}/metadata"\ntargets_url = "{url}/targets"\n'
            f'root = "{folder}/root.json"\nretry_s = 0.5\n'
        )

    def release(self, new: Path, old: Path) -> Release:
        content = new.read_bytes()
        metadata = metadata_reader.read(content)
        return self.repository.add(
            content,
            name="digits",
            model_digest=metadata.model_digest,
            guard_digest=metadata.guard_digest,
            replaces=metadata_reader.read(old.read_bytes()).model_digest,
        )

    def repair(self, new: Path, old: Path, companion: bytes) -> Release:
        """Sign a repair with the hub's key."""
        content = new.read_bytes()
        metadata = metadata_reader.read(content)
        return self.repository.add_repair(
            content,
            name="digits",
            model_digest=metadata.model_digest,
            guard_digest=metadata.guard_digest,
            replaces=metadata_reader.read(old.read_bytes()).model_digest,
            sidecar=companion,
        )

    def target(self) -> Path:
        """The file of the newest release."""
        (path,) = (self.served / "targets").iterdir()
        return path

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Be quiet."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    one = Site(tmp_path)
    yield one
    one.close()


def state(hub: TinyHub) -> str | None:
    reported = hub.latest(Reported)
    return reported.state if reported else None


def told(hub: TinyHub, sequence: int) -> str | None:
    """What became of one release, as the device says it."""
    reported = hub.latest(Reported)
    return reported.state if reported and reported.desired_sequence == sequence else None


def digests(models: tuple[Path, Path]) -> tuple[str, str]:
    first, second = (metadata_reader.read(path.read_bytes()).model_digest for path in models)
    return first, second


def birth_of(hub: TinyHub, model_digest: str) -> Birth:
    """The newest birth of a model, which follows what the device says of its update."""
    wait_until(lambda: any(birth.model_digest == model_digest for birth in hub.all(Birth)), "a birth of the model")
    return [birth for birth in hub.all(Birth) if birth.model_digest == model_digest][-1]


def test_a_swap_loses_no_input_and_every_window_has_one_model(
    hub: TinyHub, device: Make, site: Site, digit_models: tuple[Path, Path], digits: Digits
) -> None:
    release = site.release(digit_models[1], digit_models[0])
    camera = device(more=site.config)
    fed = camera.feed(digits[:100], batch=8)
    camera.start()
    wait_until(hub.reports, "a report of the old model")
    hub.hint("camera-1", release.target, release.sequence)
    for _ in range(1000):
        if state(hub) == "updated":
            break
        fed += camera.feed(digits[:8], batch=8)
        wait_until(lambda: camera.waiting() < 20, "inputs taken")
    fed += camera.feed(digits[:100], batch=8)
    wait_until(lambda: camera.waiting() == 0, "an empty inbox")
    assert camera.stop() == 0
    assert hub.inputs() == fed
    order = [report.model_digest for report in hub.reports()]
    old, new = digests(digit_models)
    assert order == [old] * order.count(old) + [new] * order.count(new)
    assert order.count(old) and order.count(new)
    birth, reported = hub.latest(Birth), hub.latest(Reported)
    assert birth is not None and reported is not None
    assert birth.model_digest == reported.model_digest == new
    assert (birth.sequence, reported.desired_sequence) == (1, 1)


def test_a_swap_closes_the_window_of_the_old_model(
    hub: TinyHub, device: Make, site: Site, digit_models: tuple[Path, Path], digits: Digits
) -> None:
    release = site.release(digit_models[1], digit_models[0])
    camera = device(more=site.config, window="inputs = 64\nseconds = 3600")
    camera.feed(digits[:48])
    camera.start()
    hub.hint("camera-1", release.target, release.sequence)
    wait_until(lambda: state(hub) == "updated", "the update")
    camera.feed(digits[:64])
    camera.wait_for_waiting(0)
    assert camera.stop() == 0
    old, new = digests(digit_models)
    assert [(report.model_digest, report.inputs) for report in hub.reports()] == [(old, 48), (new, 64)]
    states = [reported.state for reported in hub.all(Reported)]
    assert set(states[states.index("updated") :]) == {"updated"}, "nothing is left to fetch"
    assert Slots(camera.folder / "state" / "slots").confirmed, "a model that filled a window proved itself"


def test_the_new_model_still_runs_after_a_kill(
    hub: TinyHub, device: Make, site: Site, digit_models: tuple[Path, Path]
) -> None:
    release = site.release(digit_models[1], digit_models[0])
    camera = device(more=site.config)
    camera.start()
    hub.hint("camera-1", release.target, release.sequence)
    wait_until(lambda: state(hub) == "updated", "the update")
    camera.kill()
    births = len(hub.all(Birth))
    camera.start()
    wait_until(lambda: len(hub.all(Birth)) > births, "a new birth")
    assert hub.all(Birth)[-1].model_digest == digests(digit_models)[1]
    wait_until(lambda: state(hub) == "updated", "the standing hint is answered")


def test_a_tampered_file_is_refused_the_old_model_runs_on_and_the_genuine_one_follows(
    hub: TinyHub, device: Make, site: Site, digit_models: tuple[Path, Path], digits: Digits
) -> None:
    release = site.release(digit_models[1], digit_models[0])
    genuine = site.target().read_bytes()
    site.target().write_bytes(genuine[:-1] + bytes([genuine[-1] ^ 1]))
    camera = device(more=site.config)
    camera.start()
    hub.hint("camera-1", release.target, release.sequence)
    wait_until(lambda: state(hub) == "refused", "the refusal")
    fed = camera.feed(digits[:64])
    wait_until(lambda: hub.inputs() == fed, "inputs that the old model still counts")
    assert {report.model_digest for report in hub.reports()} == {digests(digit_models)[0]}
    site.target().write_bytes(genuine)
    wait_until(lambda: state(hub) == "updated", "the genuine release")
    assert camera.stop() == 0


def test_a_signed_release_that_describes_another_model_is_refused(
    hub: TinyHub, device: Make, site: Site, digit_models: tuple[Path, Path]
) -> None:
    old, new = digests(digit_models)
    content = digit_models[1].read_bytes()
    release = site.repository.add(content, name="digits", model_digest=new, guard_digest="f" * 64, replaces=old)
    camera = device(more=site.config)
    camera.start()
    hub.hint("camera-1", release.target, release.sequence)
    wait_until(lambda: state(hub) == "refused", "the refusal")
    reported = hub.latest(Reported)
    assert reported is not None and "guard_digest" in reported.reason
    assert reported.model_digest == old
    assert camera.stop() == 0


def test_a_server_that_is_down_is_a_failure_and_not_a_refusal(
    hub: TinyHub, device: Make, site: Site, digit_models: tuple[Path, Path]
) -> None:
    release = site.release(digit_models[1], digit_models[0])
    site.close()
    camera = device(more=site.config)
    camera.start()
    hub.hint("camera-1", release.target, release.sequence)
    wait_until(lambda: state(hub) == "failed", "the failure")
    assert camera.stop() == 0


def test_a_damaged_slot_falls_back_to_the_model_before_it(
    hub: TinyHub, device: Make, site: Site, digit_models: tuple[Path, Path]
) -> None:
    release = site.release(digit_models[1], digit_models[0])
    camera = device(more=site.config)
    camera.start()
    hub.hint("camera-1", release.target, release.sequence)
    wait_until(lambda: state(hub) == "updated", "the update")
    camera.kill()
    site.target().unlink()
    new = digit_models[1].read_bytes()
    slots = camera.folder / "state" / "slots"
    (active,) = (path for path in slots.glob("*.tflite") if path.read_bytes() == new)
    active.write_bytes(new[:-100])
    births = len(hub.all(Birth))
    camera.start()
    wait_until(lambda: len(hub.all(Birth)) > births, "a new birth")
    assert hub.all(Birth)[-1].model_digest == digests(digit_models)[0]


def updated(hub: TinyHub, camera: Device, site: Site, models: tuple[Path, Path]) -> None:
    """A running agent on the second model, which has filled no window yet."""
    release = site.release(models[1], models[0])
    camera.start()
    hub.hint("camera-1", release.target, release.sequence)
    wait_until(lambda: state(hub) == "updated", "the update")


def birth_after_start(hub: TinyHub, camera: Device) -> str:
    """Start the agent; the digest of the model that it says it runs."""
    births = len(hub.all(Birth))
    camera.start()
    wait_until(lambda: len(hub.all(Birth)) > births, "a new birth")
    return hub.all(Birth)[-1].model_digest


def test_a_model_that_ends_the_agent_again_and_again_is_left_and_not_taken_again(
    hub: TinyHub, device: Make, site: Site, digit_models: tuple[Path, Path]
) -> None:
    old, new = digests(digit_models)
    camera = device(more=site.config)
    updated(hub, camera, site, digit_models)
    for _ in range(2):
        camera.kill()
        assert birth_after_start(hub, camera) == new
    camera.kill()
    assert birth_after_start(hub, camera) == old
    assert len([line for line in camera.log.splitlines() if "got 3 starts" in line and "WARNING" in line]) == 1
    wait_until(lambda: state(hub) == "refused", "the hint that still stands is refused")
    reported = hub.latest(Reported)
    assert reported is not None and reported.model_digest == old
    assert camera.stop() == 0


def test_stopping_and_starting_a_device_without_inputs_does_not_count_against_its_model(
    hub: TinyHub, device: Make, site: Site, digit_models: tuple[Path, Path]
) -> None:
    camera = device(more=site.config)
    updated(hub, camera, site, digit_models)
    for _ in range(4):
        assert camera.stop() == 0
        assert birth_after_start(hub, camera) == digests(digit_models)[1]


def test_a_model_that_filled_a_window_stays_however_often_the_agent_is_killed(
    hub: TinyHub, device: Make, site: Site, digit_models: tuple[Path, Path], digits: Digits
) -> None:
    camera = device(more=site.config)
    updated(hub, camera, site, digit_models)
    camera.feed(digits[:64])
    wait_until(lambda: Slots(camera.folder / "state" / "slots").confirmed, "a filled window")
    for _ in range(3):
        camera.kill()
        assert birth_after_start(hub, camera) == digests(digit_models)[1]


def test_a_repair_brings_its_sidecar(
    hub: TinyHub, device: Make, site: Site, models_with_sidecars: tuple[Path, Path]
) -> None:
    old, new = models_with_sidecars
    companion = sidecar.path_beside(new).read_bytes()
    release = site.repair(new, old, companion)
    camera = device(more=site.config)
    camera.model = old
    camera.start()
    hub.hint("camera-1", release.target, release.sequence)
    wait_until(lambda: state(hub) in ("updated", "refused"), "an outcome", timeout_s=60)
    reported = hub.latest(Reported)
    assert reported is not None
    assert (reported.state, reported.reason) == ("updated", "")
    assert "cascade" in birth_of(hub, digests(models_with_sidecars)[1]).capabilities
    kept = camera.folder / "state" / "slots" / f"{sidecar.digest(companion)}{sidecar.SUFFIX}"
    assert kept.read_bytes() == companion
    assert camera.stop() == 0


def with_blank_self_test(model: Path) -> tuple[Path, bytes]:
    """The same model with a sidecar that a thief would choose, so that the next repair need agree on nothing."""
    content = model.read_bytes()
    loaded = GuardedModel.load(content)
    metadata = loaded.metadata
    x = np.zeros((20, *metadata.input.shape), metadata.input.dtype)
    verdict = loaded.infer(x[0]).verdict
    companion = sidecar.encode(
        Sidecar(
            overlays=x,
            self_test=x,
            predicted=np.full(20, verdict.predicted, np.int64),
            scores=np.tile(np.fromiter(verdict.scores.values(), np.float32), (20, 1)),
            stages={},
        )
    )
    assert metadata.sidecar_digest is not None
    path = model.parent / "blank.tflite"
    path.write_bytes(content.replace(metadata.sidecar_digest.encode(), sidecar.digest(companion).encode()))
    return path, companion


def test_a_repair_takes_the_place_of_one_on_trial_and_is_held_against_the_installed_models_sidecar(
    hub: TinyHub, device: Make, site: Site, models_with_sidecars: tuple[Path, Path], digits: Digits
) -> None:
    old, new = models_with_sidecars
    blank, companion = with_blank_self_test(old)
    first = site.repair(blank, old, companion)
    camera = device(more=site.config)
    camera.model = old
    camera.start()
    hub.hint("camera-1", first.target, first.sequence)
    wait_until(lambda: state(hub) in ("updated", "refused"), "an outcome", timeout_s=60)
    assert state(hub) == "updated", hub.latest(Reported)
    slots = Slots(camera.folder / "state" / "slots")
    anchor = metadata_reader.read(old.read_bytes()).sidecar_digest
    assert slots.active().anchor == anchor
    second = site.repair(new, blank, sidecar.path_beside(new).read_bytes())
    hub.hint("camera-1", second.target, second.sequence)
    wait_until(lambda: told(hub, second.sequence) in ("updated", "refused"), "an outcome", timeout_s=60)
    reported = hub.latest(Reported)
    assert reported is not None
    assert (reported.state, reported.reason, reported.sequence) == ("updated", "", second.sequence)
    before = slots.previous()
    assert before is not None
    assert (before.sequence, slots.read(before)) == (0, old.read_bytes()), "the way back is what proved itself"
    assert (slots.highest, slots.confirmed, slots.active().anchor) == (0, False, anchor)
    camera.feed(digits[:64])
    wait_until(lambda: slots.confirmed, "the end of the trial")
    assert slots.highest == second.sequence
    assert camera.stop() == 0


def test_a_repair_for_a_device_that_cannot_hold_it_against_its_own_model_is_refused(
    hub: TinyHub, device: Make, site: Site, digit_models: tuple[Path, Path], models_with_sidecars: tuple[Path, Path]
) -> None:
    old, new = models_with_sidecars
    release = site.repair(new, old, sidecar.path_beside(new).read_bytes())
    camera = device(more=site.config)
    assert not sidecar.path_beside(camera.model).exists()
    camera.start()
    hub.hint("camera-1", release.target, release.sequence)
    wait_until(lambda: state(hub) == "refused", "the refusal", timeout_s=60)
    reported = hub.latest(Reported)
    assert reported is not None and "self-test inputs of the last release signed offline" in reported.reason
    assert reported.model_digest == digests(digit_models)[0]
    assert camera.stop() == 0


# Which thread does what


@dataclass
class Observed:
    """An agent in this process; each opening and each run of a model is noted, with its thread.

    ``opened`` is set when the new model is about to be opened, which then waits for ``go``. ``is_sick`` makes the new
    model fail on inputs.
    """

    old: str
    new: str
    opened: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)
    runs: list[tuple[str, str]] = field(default_factory=list)
    is_sick: bool = False

    def watch(self, load: Callable[[bytes], GuardedModel], content: bytes) -> GuardedModel:
        """Open a model, as ``load`` does."""
        digest = metadata_reader.read(content).model_digest
        if digest == self.new:
            self.runs.append(("opened by", threading.current_thread().name))
            self.opened.set()
            assert self.go.wait(60)
        model = load(content)
        invoke = model._model.invoke

        def noted(tensor: Any) -> Any:
            thread = threading.current_thread().name
            self.runs.append((digest, thread))
            if digest == self.new and self.is_sick and thread == "loop":
                raise ModelError("model file", got="refused to run")
            return invoke(tensor)

        model._model.invoke = noted  # type: ignore[method-assign]
        return model

    def on_loop(self) -> list[str]:
        """The models that the loop ran, in order."""
        return [digest for digest, thread in self.runs if thread == "loop"]


class Program:
    """Sends inputs over the agent's socket, one after the other."""

    def __init__(self, path: Path) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.settimeout(60)
        self._connection.connect(str(path))
        self._reader = frames.Reader()

    def ask(self, x: npt.NDArray[np.uint8]) -> frames.Result:
        """The answer to one input, and only one."""
        sent = frames.Input(id="x", encoding="array", dtype="uint8", shape=x.shape)
        self._connection.sendall(frames.encode(sent, x.tobytes()))
        found: list[Any] = []
        while not found:
            found = self._reader.feed(self._connection.recv(1 << 20))
        ((answer, _),) = found
        assert isinstance(answer, frames.Result)
        return answer

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def observed(
    device: Make, site: Site, digit_models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Observed, Program, Device]]:
    """An agent that runs the first model, and a program that it serves."""
    camera = device(more=f"{site.config}trial_inputs = 8\n", window="inputs = 4\nseconds = 0.2")
    camera.sources = '[sources.socket]\npath = "agent.sock"\n'
    seen = Observed(*digests(digit_models))
    real = startup.loader
    monkeypatch.setattr(startup, "loader", lambda runtime: functools.partial(seen.watch, real(runtime)))
    agent = Agent(configuration.load(camera.config()))
    loop = threading.Thread(target=agent.run, args=(seen.stop.is_set,), name="loop")
    loop.start()
    path = camera.folder / "agent.sock"
    wait_until(path.exists, "the socket")
    program = Program(path)
    yield seen, program, camera
    program.close()
    seen.go.set()
    seen.stop.set()
    loop.join(60)
    assert not loop.is_alive()


def test_the_loop_goes_on_while_the_new_model_is_opened_and_runs_nothing_but_one_inference_an_input(
    hub: TinyHub, observed: tuple[Observed, Program, Device], site: Site, digit_models: tuple[Path, Path],
    digits: Digits,
) -> None:  # fmt: skip
    seen, program, _ = observed
    release = site.release(digit_models[1], digit_models[0])
    hub.hint("camera-1", release.target, release.sequence)
    assert seen.opened.wait(60)
    for x in digits[:5]:
        program.ask(x)
    assert seen.on_loop() == [seen.old] * 5, "each of them was answered, and by the old model"
    seen.go.set()
    asked = 5
    while seen.on_loop()[-1] == seen.old:
        program.ask(digits[asked % 100])
        asked += 1
    for x in digits[:5]:
        program.ask(x)
    order = seen.on_loop()
    assert len(order) == asked + 5, "the exchange costs the loop no inference"
    assert order == [seen.old] * order.count(seen.old) + [seen.new] * order.count(seen.new)
    assert ("opened by", "reporter") in seen.runs
    assert ("opened by", "loop") not in seen.runs
    assert seen.runs.index((seen.new, "reporter")) < seen.runs.index((seen.new, "loop")), "its first run is no input's"
    wait_until(lambda: hub.inputs() == asked + 5, "a report of each input")


def test_a_model_that_fails_on_real_inputs_makes_way_for_the_one_before_and_is_refused(
    hub: TinyHub, observed: tuple[Observed, Program, Device], site: Site, digit_models: tuple[Path, Path],
    digits: Digits,
) -> None:  # fmt: skip
    seen, program, camera = observed
    seen.is_sick = True
    seen.go.set()
    release = site.release(digit_models[1], digit_models[0])
    hub.hint("camera-1", release.target, release.sequence)
    wait_until(lambda: state(hub) == "updated", "the update", timeout_s=60)
    asked = 0
    while state(hub) != "refused" and asked < 1000:
        program.ask(digits[asked % 100])
        asked += 1
        time.sleep(0.01)  # the judgement is the reporter's, and takes none of the loop's time
    reported = hub.latest(Reported)
    assert reported is not None
    assert (reported.state, reported.model_digest, reported.desired_sequence) == ("refused", seen.old, release.sequence)
    assert "inputs could not be scored" in reported.reason
    assert birth_of(hub, seen.old).sequence == 0
    slots = Slots(camera.folder / "state" / "slots")
    assert (slots.active().sequence, slots.confirmed, len(slots.failed)) == (0, True, 1)
    program.ask(digits[0])
    assert seen.on_loop()[-1] == seen.old
    wait_until(lambda: hub.inputs() == asked + 1, "a report of each input")
