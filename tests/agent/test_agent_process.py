"""The agent as a real process, on a real broker, running a real guarded model: nothing lost, nothing counted twice."""

from __future__ import annotations

import json
import math
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgeguard.agent.config import PolicyConfig
from edgeguard.agent.inference import line_of, policy_of, result_of
from edgeguard.agent.spool import read_counters
from edgeguard.contract import topics
from edgeguard.contract.guard import GuardMetadata
from edgeguard.contract.messages import Birth, Reported, Status
from edgeguard.detection import metadata as metadata_reader
from edgeguard.detection.verdict import judge
from tests.agent.conftest import Device
from tests.simulators.attacked import Attacked
from tests.simulators.mosquitto import Mosquitto, free_port
from tests.simulators.tiny_hub import TinyHub, wait_until

Make = Callable[..., Device]
Digits = npt.NDArray[np.uint8]


def test_every_input_reaches_the_hub_once(hub: TinyHub, device: Make, digits: Digits) -> None:
    camera = device()
    fed = camera.feed(digits[:200])
    camera.start()
    wait_until(lambda: camera.waiting() == 0, "an empty inbox")
    assert camera.stop() == 0
    assert hub.inputs() == fed
    assert read_counters(camera.spool).pending == 0
    assert read_counters(camera.spool).reports_total == len(hub.reports())
    assert hub.reports()[0].inputs == 64


def test_a_device_says_what_it_is_and_runs(hub: TinyHub, device: Make, digit_models: tuple[Path, Path]) -> None:
    camera = device()
    camera.start()
    wait_until(lambda: hub.latest(Reported), "the reported model")
    status, birth, reported = hub.latest(Status), hub.latest(Birth), hub.latest(Reported)
    metadata: GuardMetadata = metadata_reader.read(digit_models[0].read_bytes())
    assert isinstance(status, Status) and isinstance(birth, Birth) and isinstance(reported, Reported)
    assert status.state == "online"
    assert status.session == birth.session == read_counters(camera.spool).session
    assert birth.model_digest == reported.model_digest == metadata.model_digest
    assert (reported.state, reported.sequence, reported.desired_sequence) == ("running", 0, None)


def test_a_stopped_device_says_so_and_exits_with_0(hub: TinyHub, device: Make) -> None:
    camera = device()
    camera.start()
    wait_until(lambda: hub.latest(Status), "a status")
    assert camera.stop() == 0
    hub.wait_for(Status, 2)
    status = hub.latest(Status)
    assert isinstance(status, Status) and status.state == "stopped"


def test_a_killed_device_leaves_a_will_of_the_session_of_its_birth(hub: TinyHub, device: Make) -> None:
    camera = device()
    sessions = []
    for count in (1, 2):
        camera.start()
        hub.wait_for(Birth, count)
        birth = hub.latest(Birth)
        camera.kill()
        hub.wait_for(Status, 2 * count)
        will = hub.latest(Status)
        assert isinstance(birth, Birth) and isinstance(will, Status)
        assert (will.state, will.session, will.boot) == ("offline", birth.session, birth.boot)
        sessions.append(birth.session)
    assert sessions[1] == sessions[0] + 1


def test_a_puback_alone_does_not_empty_the_spool(hub: TinyHub, device: Make, digits: Digits) -> None:
    hub.acking = False
    camera = device()
    fed = camera.feed(digits[:128])
    camera.start()
    wait_until(lambda: hub.inputs() == fed, "all reports")
    counters = read_counters(camera.spool)
    assert counters.pending == counters.reports_total + counters.alerts_total > 0


def test_a_report_is_sent_again_until_the_hub_acknowledges_it(hub: TinyHub, device: Make, digits: Digits) -> None:
    hub.acking = False
    camera = device()
    camera.feed(digits[:64])
    camera.start()
    wait_until(lambda: hub.heard and min(hub.heard.values()) >= 2, "a second delivery of everything")
    hub.acking = True
    wait_until(lambda: read_counters(camera.spool).pending == 0, "an empty spool")
    assert hub.inputs() == 64


def test_what_the_hub_lost_is_sent_again_while_later_reports_are_acknowledged(
    hub: TinyHub, device: Make, digits: Digits
) -> None:
    hub.losing = {2}
    camera = device(window="inputs = 16", resend_s=3600)
    fed = camera.feed(digits[:160])
    camera.start()
    wait_until(lambda: hub.inputs() == fed, "every report, the lost one too")
    wait_until(lambda: read_counters(camera.spool).pending == 0, "an empty spool")


def test_a_new_connection_brings_everything_again_without_waiting_for_the_time_out(
    mosquitto: Mosquitto, hub: TinyHub, device: Make, digits: Digits
) -> None:
    hub.acking = False
    camera = device(resend_s=3600)
    camera.feed(digits[:64])
    camera.start()
    wait_until(hub.reports, "a report")
    hub.acking = True
    # Another client under the agent's name: the broker ends the agent's connection, as a faulty network would.
    intruder = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="edgeguard-demo-camera-1")
    intruder.connect("127.0.0.1", mosquitto.port)
    intruder.loop_start()
    hub.wait_for(Birth, 2)
    intruder.loop_stop()
    wait_until(lambda: read_counters(camera.spool).pending == 0, "an empty spool")


def test_inputs_go_on_being_counted_while_the_broker_is_down_from_the_start(
    mosquitto: Mosquitto, device: Make, digits: Digits
) -> None:
    mosquitto.stop()
    camera = device()
    fed = camera.feed(digits[:100])
    camera.start()
    wait_until(lambda: camera.waiting() <= 2, "an inbox that is worked off")
    mosquitto.start()
    hub = TinyHub(mosquitto.port)
    assert camera.stop() == 0
    assert hub.inputs() == fed
    hub.close()


def test_a_killed_broker_loses_no_report(mosquitto: Mosquitto, hub: TinyHub, device: Make, digits: Digits) -> None:
    camera = device(window="inputs = 16")
    camera.start()
    fed = camera.feed(digits[:150])
    wait_until(hub.reports, "a first report")
    mosquitto.kill()
    fed += camera.feed(digits[150:300])
    wait_until(lambda: camera.waiting() <= 1, "an inbox that is worked off meanwhile")
    mosquitto.start()
    wait_until(lambda: read_counters(camera.spool).pending == 0, "an empty spool")
    assert camera.stop() == 0
    assert hub.inputs() == fed
    assert read_counters(camera.spool).reports_total == len(hub.reports())


@pytest.mark.parametrize("broker_up", [True, False])
def test_an_agent_killed_again_and_again_counts_every_input_once(
    mosquitto: Mosquitto, hub: TinyHub, device: Make, digits: Digits, broker_up: bool
) -> None:
    if not broker_up:
        mosquitto.stop()
    camera = device(window="inputs = 20")
    fed = 0
    for _ in range(5):
        fed += camera.feed(digits[:400], batch=4)
        camera.start()
        camera.wait_for_waiting(camera.waiting() - 6)
        camera.kill()
    assert camera.waiting() > 0, "the kills came too late to show anything"
    if not broker_up:
        mosquitto.start()
    camera.start()
    wait_until(lambda: camera.waiting() == 0, "an empty inbox")
    assert camera.stop() == 0
    assert hub.inputs() == fed
    assert len({report.boot for report in hub.reports()}) > 1
    assert read_counters(camera.spool).reports_total == len(hub.reports())


def test_batches_counted_before_a_kill_but_not_yet_deleted_are_not_counted_again(
    hub: TinyHub, device: Make, digits: Digits, tmp_path: Path
) -> None:
    camera = device()
    fed = camera.feed(digits[:64])
    kept = {path.name: path.read_bytes() for path in camera.inbox.glob("*.npy")}
    camera.start()
    wait_until(lambda: camera.waiting() == 0, "an empty inbox")
    camera.kill()
    # As if the kill had come between the commit and the deletion.
    with sqlite3.connect(camera.spool) as db:
        db.executemany("INSERT OR IGNORE INTO consumed VALUES (?)", [(name,) for name in kept])
    for name, content in kept.items():
        (camera.inbox / name).write_bytes(content)
    fed += camera.feed(digits[:32])
    camera.start()
    wait_until(lambda: camera.waiting() == 0, "an empty inbox")
    assert camera.stop() == 0
    assert hub.inputs() == fed


def test_results_have_one_line_per_counted_input(
    hub: TinyHub, device: Make, attacked: Attacked, guarded_file: Path
) -> None:
    camera = device(more='[results]\npath = "results.jsonl"\n')
    camera.model = guarded_file
    fed = camera.feed(attacked.data.x_test[:40].astype(np.uint8))
    fed += camera.feed(attacked.attack.stamp(attacked.data.x_test[:40].astype(np.uint8)))
    camera.start()
    wait_until(lambda: camera.waiting() <= 3 and hub.latest(Status), "inputs taken")
    assert camera.stop() == 0
    lines = [json.loads(line) for line in (camera.folder / "results.jsonl").read_text().splitlines()]
    assert len(lines) == fed
    assert sum(line["flagged"] for line in lines) == sum(c.flagged for r in hub.reports() for c in r.labels) > 0
    assert {(line["status"], line["flagged"]) for line in lines} == {("clean", False), ("flagged", True)}
    keys = ("flagged", "index", "name", "p_value", "policy", "predicted", "reason", "score", "source", "status")
    assert {tuple(sorted(line)) for line in lines} == {keys}


def test_an_input_that_was_not_checked_is_not_called_clean() -> None:
    verdict = judge(3, {"linf": math.nan})
    result, _ = result_of("000.npy", None, verdict, policy_of(verdict, PolicyConfig()))
    line = line_of("folder", "000.npy", 0, result)
    assert (line["status"], line["flagged"], line["score"]) == ("not checked", None, None)


def test_an_agent_that_shall_stop_at_the_end_does(hub: TinyHub, device: Make, digits: Digits) -> None:
    camera = device()
    camera.config()
    fed = camera.feed(digits[:30])
    (camera.inbox / "end").touch()
    config = camera.folder / "agent.toml"
    config.write_text(config.read_text().replace('path = "inbox"', 'path = "inbox"\nstop_at_end = true'))
    done = subprocess.run([sys.executable, "-m", "edgeguard.agent", "--config", str(config)], timeout=60, check=False)
    assert done.returncode == 0
    assert hub.inputs() == fed


def test_a_bad_batch_stops_nothing(hub: TinyHub, device: Make, digits: Digits) -> None:
    camera = device()
    (camera.inbox / "000.npy").write_bytes(b"no array")
    fed = camera.feed(digits[:70])
    camera.start()
    wait_until(lambda: camera.waiting() == 0 or hub.inputs() >= 64, "batches counted")
    assert camera.stop() == 0
    assert hub.inputs() == fed
    assert "rejected" in camera.log


def test_a_second_agent_on_the_same_state_is_refused(device: Make, hub: TinyHub) -> None:
    camera = device()
    camera.start()
    wait_until(lambda: hub.latest(Birth), "a birth")
    done = run(camera.folder / "agent.toml")
    assert done.returncode == 2
    assert "another agent" in done.stderr


def run(config: Path, *arguments: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def bound() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "edgeguard.agent", "--config", str(config), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=bound,
    )


def lines_of_error(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


SPOILED = {
    "a missing model": ("model =", 'model = "nowhere.tflite"', "nowhere.tflite"),
    "a model that is not TFLite": ("model =", 'model = "agent.toml"', "TFL"),
    "a missing source": ("path =", 'path = "nowhere"', "nowhere"),
    "an unknown key": ("fleet =", 'fleet = "demo"\nflete = 1', "flete"),
    "a broker whose CA is missing": ("host =", 'host = "h"\nca = "nowhere.pem"', "nowhere.pem"),
}


def test_a_state_folder_in_the_way_is_one_line_and_exit_2(device: Make) -> None:
    camera = device()
    config = camera.config()
    config.write_text(config.read_text().replace('"state"', '"agent.toml"'))
    done = run(config)
    assert done.returncode == 2
    assert len(lines_of_error(done)) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("spoiled", SPOILED.values(), ids=SPOILED.keys())
@pytest.mark.parametrize("arguments", [(), ("--check",)], ids=["run", "check"])
def test_bad_input_is_one_line_and_exit_2(
    device: Make, spoiled: tuple[str, str, str], arguments: tuple[str, ...]
) -> None:
    key, line, named = spoiled
    camera = device()
    config = camera.config()
    config.write_text("\n".join(line if old.startswith(key) else old for old in config.read_text().splitlines()))
    done = run(config, *arguments)
    assert done.returncode == 2
    (error,) = lines_of_error(done)
    assert named in error
    assert "Traceback" not in done.stderr
    assert not [path for path in camera.folder.rglob("*") if ".tmp" in path.name]


def test_clean_data_for_recalibration_that_is_not_there_is_one_line_and_exit_2(device: Make) -> None:
    config = device().config()
    config.write_text(config.read_text() + '\n[recalibrate]\ndata = "clean.npz"\n')
    done = run(config, "--check")
    assert done.returncode == 2
    (error,) = lines_of_error(done)
    assert "recalibrate.data" in error and "clean.npz" in error


def test_a_check_needs_the_broker_and_leaves_nothing(mosquitto: Mosquitto, device: Make) -> None:
    camera = device()
    assert run(camera.config(), "--check").returncode == 0
    mosquitto.stop()
    done = run(camera.config(), "--check")
    assert done.returncode == 2
    assert len(lines_of_error(done)) == 1
    assert f"127.0.0.1:{mosquitto.port}" in done.stderr
    assert not (camera.folder / "state").exists()


def test_a_full_disk_stops_no_inference_and_loses_no_input(hub: TinyHub, device: Make, digits: Digits) -> None:
    camera = device(window="inputs = 1", more='[results]\npath = "results.jsonl"\n')
    camera.start()
    wait_until(lambda: hub.latest(Birth), "a birth")
    camera.kill()
    camera.port = free_port()
    fed = camera.feed(digits[:400], batch=1)
    # No file of this process may grow beyond the limit; to SQLite that is a disk that is full.
    full = max(p.stat().st_size for p in (camera.folder / "state").rglob("*")) + 4096
    camera.start(limit=full)
    wait_until(lambda: "nothing can be recorded" in camera.log, "a complaint")
    wait_until(lambda: "runs model" in camera.log.split("nothing can be recorded")[0], "an agent at work")
    assert camera.running()
    assert camera.stop() == 2
    (error,) = [line for line in camera.log.splitlines() if line.startswith("error:")]
    assert "spool" in error
    assert "Traceback" not in camera.log
    camera.port = hub.port
    camera.start()
    wait_until(lambda: camera.waiting() == 0, "an empty inbox")
    assert camera.stop() == 0
    assert hub.inputs() == fed


def test_a_hostile_ack_or_hint_stops_nothing(hub: TinyHub, device: Make, digits: Digits) -> None:
    camera = device()
    camera.start()
    wait_until(lambda: hub.latest(Birth), "a birth")
    hub.send("camera-1", topics.ACK, b"\x00" * 100)
    hub.send("camera-1", topics.MODEL_DESIRED, b'{"target":"../../etc/passwd","sequence":1}')
    fed = camera.feed(digits[:64])
    wait_until(lambda: hub.inputs() == fed, "the report")
    assert camera.stop() == 0
