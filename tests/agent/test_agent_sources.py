"""The agent as a real process, fed through a socket, standard input, an MQTT topic and a camera."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgeguard.agent import quarantine
from edgeguard.contract import frames, messages, topics
from edgeguard.contract.messages import Birth, Health, Ping, PingReply, Rank, RankReply, Restart, decode, encode
from edgeguard.detection.guarded import GuardedModel
from edgeguard.detection.sidecar import path_beside
from tests.agent.conftest import Device
from tests.simulators.attacked import Attacked
from tests.simulators.mosquitto import Mosquitto, free_port
from tests.simulators.tiny_hub import TinyHub, wait_until

Make = Callable[..., Device]
Digits = npt.NDArray[np.uint8]
SOCKET = '[sources.socket]\npath = "agent.sock"\n'


def frame(x: npt.NDArray[np.uint8], name: str = "") -> bytes:
    return frames.encode(frames.Input(id=name, encoding="array", dtype="uint8", shape=x.shape), x.tobytes())


class Program:
    """A program that has inputs run by the agent on its device."""

    def __init__(self, device: Device) -> None:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection.settimeout(20)
        path = device.folder / "agent.sock"
        wait_until(lambda: self.connection.connect_ex(str(path)) == 0, "the agent's socket")
        self._reader = frames.Reader()

    def ask(self, inputs: npt.NDArray[np.uint8]) -> list[tuple[frames.Result, bytes]]:
        """The results of some inputs, in their order."""
        for index, x in enumerate(inputs):
            self.connection.sendall(frame(x, str(index)))
        found: list[tuple[frames.AnyFrame, bytes]] = []
        while len(found) < len(inputs):
            found += self._reader.feed(self.connection.recv(1 << 16))
        results = [(answer, body) for answer, body in found if isinstance(answer, frames.Result)]
        assert [result.id for result, _ in results] == [str(index) for index in range(len(inputs))]
        return results


def test_a_program_gets_the_models_own_outputs_and_every_input_reaches_the_hub(
    hub: TinyHub, device: Make, digits: Digits, digit_models: tuple[Path, Path]
) -> None:
    camera = device(sources=SOCKET)
    camera.start()
    results = Program(camera).ask(digits[:40])
    model = GuardedModel.load(digit_models[0].read_bytes())
    for x, (result, body) in zip(digits, results, strict=False):
        inference = model.infer(x)
        (output,) = result.outputs
        np.testing.assert_array_equal(np.frombuffer(body, output.dtype).reshape(output.shape), inference.outputs[0])
        assert (result.predicted, result.status) == (inference.verdict.predicted, inference.verdict.status)
    assert camera.stop() == 0
    assert hub.inputs() == 40


def test_what_the_policy_withholds_is_not_in_the_result(
    hub: TinyHub, device: Make, attacked: Attacked, guarded_file: Path
) -> None:
    camera = device(sources=SOCKET, more='[policy]\nflagged = "withhold"\n[quarantine]\npath = "kept"\n')
    camera.model = guarded_file
    camera.start()
    inputs = attacked.attack.stamp(attacked.data.x_test[:30].astype(np.uint8))
    results = Program(camera).ask(inputs)
    flagged = [(result, body) for result, body in results if result.status == "flagged"]
    assert len(flagged) > 20
    assert {(result.policy, result.predicted, result.outputs, body) for result, body in flagged} == {
        ("withhold", None, (), b"")
    }
    assert camera.stop() == 0
    kept = [quarantine.read(path) for path in sorted((camera.folder / "kept").glob("*.npz"))]
    assert len(kept) == len(flagged)
    assert {about.predicted for _, about in kept} == {attacked.attack.target}
    np.testing.assert_array_equal(kept[0][0], inputs[int(flagged[0][0].id)])


def test_a_broker_that_hangs_and_one_that_is_gone_delay_no_result(
    mosquitto: Mosquitto, hub: TinyHub, device: Make, digits: Digits
) -> None:
    camera = device(sources=SOCKET, window="inputs = 10")
    camera.start()
    wait_until(lambda: hub.latest(Birth), "a birth")
    program = Program(camera)
    mosquitto.signal(signal.SIGSTOP)
    assert len(program.ask(digits[:200])) == 200
    mosquitto.signal(signal.SIGCONT)
    mosquitto.kill()
    assert len(program.ask(digits[:200])) == 200
    mosquitto.start()
    wait_until(lambda: hub.inputs() == 400, "every report")
    assert camera.stop() == 0


def test_a_full_disk_delays_no_result_and_its_inputs_are_reported_once_there_is_room(
    hub: TinyHub, device: Make, digits: Digits
) -> None:
    camera = device(sources=SOCKET, window="inputs = 10")
    camera.start()
    wait_until(lambda: hub.latest(Birth), "a birth")
    wal = camera.folder / "state" / "spool.sqlite-wal"
    process = camera.process()
    limit = wal.stat().st_size + 8192
    limit_file_size(process.pid, limit)
    program = Program(camera)
    assert len(program.ask(digits[:400])) == 400
    wait_until(lambda: "nothing can be recorded" in camera.log, "a complaint")
    assert len(program.ask(digits[:100])) == 100
    limit_file_size(process.pid, None)
    wait_until(lambda: hub.inputs() == 500, "every input reported")
    assert camera.stop() == 0


def limit_file_size(pid: int, size: int | None) -> None:
    """No file of a process may grow beyond ``size`` bytes: to SQLite that is a disk that is full."""
    import resource

    hard = resource.RLIM_INFINITY
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def test_scores_of_a_programs_own_interpreter_are_reported_under_its_own_model(
    hub: TinyHub, device: Make, digits: Digits, digit_models: tuple[Path, Path]
) -> None:
    camera = device(sources=SOCKET)
    camera.start()
    connection = Program(camera).connection
    other = GuardedModel.load(digit_models[1].read_bytes())
    for x in digits[:20]:
        inference = other.infer(x)
        connection.sendall(
            frames.encode(
                frames.Scored(
                    model_digest=other.metadata.model_digest,
                    guard_digest=other.metadata.guard_digest,
                    predicted=inference.verdict.predicted,
                    scores=tuple(inference.verdict.scores.values()),
                    detectors=tuple(inference.verdict.scores),
                    p_value=inference.verdict.p_value,
                    features=len(inference.features),
                ),
                inference.features.tobytes(),
            )
        )
    wait_until(lambda: hub.inputs() == 20, "the reports")
    assert {report.model_digest for report in hub.reports()} == {other.metadata.model_digest}
    assert camera.stop() == 0


def test_scores_under_the_agents_own_digests_are_kept_apart_and_stop_nothing(
    hub: TinyHub, device: Make, digits: Digits, digit_models: tuple[Path, Path]
) -> None:
    camera = device(sources=SOCKET)
    camera.start()
    liar, honest = Program(camera), Program(camera)
    own = GuardedModel.load(digit_models[0].read_bytes()).metadata
    lie = frames.Scored(
        model_digest=own.model_digest,
        guard_digest=own.guard_digest,
        predicted=1,
        scores=(9.0,),
        detectors=("l1",),
        p_value=None,
        features=1,
    )
    liar.connection.sendall(frames.encode(lie, bytes(4)))
    assert len(honest.ask(digits[:30])) == 30
    wait_until(lambda: hub.inputs() == 31, "both reports")
    assert sorted(report.inputs for report in hub.reports()) == [1, 30]
    assert camera.stop() == 0


def test_standard_input_is_read_to_its_end_and_results_go_to_standard_output(
    hub: TinyHub, device: Make, digits: Digits
) -> None:
    camera = device(sources="[sources.stdin]\n", more='[results]\npath = "-"\n')
    done = subprocess.run(
        [sys.executable, "-m", "edgeguard.agent", "--config", str(camera.config())],
        input=b"".join(frame(x, f"n{index}") for index, x in enumerate(digits[:25])),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["name"] for line in lines] == [f"n{index}" for index in range(25)]
    assert hub.inputs() == 25


def test_messages_of_a_topic_are_inputs_and_results_go_to_another(
    mosquitto: Mosquitto, hub: TinyHub, device: Make, digits: Digits
) -> None:
    heard: list[dict[str, object]] = []
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.on_message = lambda _c, _u, message: heard.append(json.loads(message.payload))
    client.connect("127.0.0.1", mosquitto.port)
    client.subscribe("site/results")
    client.loop_start()
    camera = device(sources='[sources.mqtt]\ntopic = "site/camera"\n', more='[results]\ntopic = "site/results"\n')
    camera.start()
    wait_until(lambda: hub.latest(Birth), "a birth")
    deadline = time.monotonic() + 20
    while not heard and time.monotonic() < deadline:
        client.publish("site/camera", b"no image")
        client.publish("site/camera", frame(digits[0], "first"))
        time.sleep(0.3)
    assert heard[0]["name"] == "first"
    assert camera.stop() == 0
    client.disconnect()
    client.loop_stop()
    assert "message dropped" in camera.log


def test_the_topic_may_be_one_of_another_broker(
    mosquitto: Mosquitto, hub: TinyHub, device: Make, digits: Digits, tmp_path: Path
) -> None:
    local = Mosquitto(tmp_path / "local")
    local.start()
    camera = device(sources=f'[sources.mqtt]\ntopic = "site/camera"\nhost = "127.0.0.1"\nport = {local.port}\n')
    camera.start()
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", local.port)
    client.loop_start()
    deadline = time.monotonic() + 30
    while not hub.inputs() and time.monotonic() < deadline:
        client.publish("site/camera", frame(digits[0]))
        time.sleep(0.3)
    assert camera.stop() == 0
    client.disconnect()
    client.loop_stop()
    local.stop()
    assert hub.inputs() > 0


def test_every_frame_of_a_video_file_is_an_input(hub: TinyHub, device: Make) -> None:
    cv2 = pytest.importorskip("cv2") if os.environ.get("CI") != "true" else __import__("cv2")
    camera = device(sources='[sources.camera]\ndevice = "video.avi"\n')
    writer = cv2.VideoWriter(str(camera.folder / "video.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 64))
    for number in range(30):
        writer.write(np.full((64, 64, 3), 8 * number, np.uint8))
    writer.release()
    done = subprocess.run(
        [sys.executable, "-m", "edgeguard.agent", "--config", str(camera.config())],
        cwd=camera.folder,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert hub.inputs() == 30


def test_a_device_answers_commands_and_ends_when_it_is_asked_to_restart(hub: TinyHub, device: Make) -> None:
    camera = device()
    process = camera.start()
    wait_until(lambda: hub.latest(Birth), "a birth")
    birth = hub.latest(Birth)
    assert isinstance(birth, Birth) and "commands" in birth.capabilities
    salts = iter(range(100))

    def ask(command: messages.Command) -> bytes:
        hub.send("camera-1", topics.command(command.name), encode(command))
        wait_until(lambda: hub.replies, "a reply")
        return hub.replies.pop()

    def new_id() -> str:
        return messages.transaction(time.time_ns() // 1_000_000, f"{next(salts):04x}")

    ping = Ping(id=new_id())
    first = ask(ping)
    answer = decode(PingReply, first)
    assert answer.result is not None and answer.result.boot == birth.boot
    assert ask(ping) == first
    refused = decode(RankReply, ask(Rank(id=new_id(), model_digest=birth.model_digest)))
    assert refused.state == "refused" and "unflagged" in refused.reason
    ask(Restart(id=new_id()))
    assert process.wait(20) == 0


def test_a_budget_that_is_exceeded_lowers_the_level_of_service_and_says_why(hub: TinyHub, device: Make) -> None:
    camera = device(more="[budget]\nmemory_mib = 1.0\n", top="health_s = 0.5\n")
    camera.start()
    wait_until(lambda: (health := hub.latest(Health)) is not None and health.level != "everything", "a lower level")
    health = hub.latest(Health)
    assert health is not None and health.level == "no_random_audits"
    assert "memory" in health.reason
    assert camera.stop() == 0


def test_a_site_that_changed_is_said_to_need_calibration_and_one_that_did_not_is_not(
    hub: TinyHub, device: Make, digits: Digits
) -> None:
    camera = device(sources=SOCKET, top="health_s = 0.5\n", window="inputs = 50")
    camera.start()
    program = Program(camera)
    program.ask(digits[:400])
    wait_until(lambda: (health := hub.latest(Health)) is not None and health.inputs == 400, "a health message")
    health = hub.latest(Health)
    assert health is not None and health.drift == "steady"
    program.ask((digits * 0.5 + 40).astype(np.uint8))
    wait_until(lambda: (h := hub.latest(Health)) is not None and h.drift == "recalibrate", "drift", timeout_s=10)
    assert "recalibrate" in camera.log
    assert camera.stop() == 0


def test_an_idle_agent_feeds_the_watchdog_with_self_tests_and_a_wedged_one_does_not(
    hub: TinyHub, device: Make, tmp_path: Path
) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(15)
        camera = device(port=free_port())
        process = camera.start(environment={"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "1500000"})

        def heard(what: bytes) -> None:
            while what not in manager.recv(4096):
                pass

        heard(b"READY=1")
        for _ in range(5):
            heard(b"WATCHDOG=1")
        process.send_signal(signal.SIGSTOP)  # as a runtime that never comes back
        manager.settimeout(3)
        with pytest.raises(TimeoutError):
            while True:
                heard(b"WATCHDOG=1")
        process.send_signal(signal.SIGCONT)
        manager.settimeout(15)
        heard(b"WATCHDOG=1")
        assert camera.stop() == 0
        heard(b"STOPPING=1")


def test_the_sidecar_beside_the_model_brings_further_looks_and_survives_a_move(
    hub: TinyHub, device: Make, attacked: Attacked, audited_file: Path
) -> None:
    camera = device(sources=SOCKET)
    camera.model = camera.folder / "m.guarded.tflite"
    camera.model.write_bytes(audited_file.read_bytes())
    beside = camera.folder / "m.guard.npz"
    beside.write_bytes(path_beside(audited_file).read_bytes())
    for _ in range(2):
        camera.start()
        results = Program(camera).ask(attacked.data.x_test[:60].astype(np.uint8))
        assert any(len(result.stages) > 1 for result, _ in results)
        assert camera.stop() == 0
        beside.unlink(missing_ok=True)
