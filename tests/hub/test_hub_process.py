"""The hub as a process: killed and started again, stopped, wrongly configured."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgeguard.contract import topics
from edgeguard.errors import EXIT_CLEAN, EXIT_INTERNAL, EXIT_USAGE
from edgeguard.hub import cases
from edgeguard.hub.casebook import Casebook, Move
from edgeguard.hub.policy import Suspicion
from edgeguard.hub.service import Hub
from tests.hub.conftest import Setting
from tests.simulators import fleet
from tests.simulators.fleet import Publisher, wait_until
from tests.simulators.mosquitto import Mosquitto, free_port
from tests.simulators.postgres import Postgres

REPORTS = 200


def exit_of(setting: Setting, *arguments: str) -> tuple[int, str]:
    process = setting.start(*arguments)
    return process.wait(30), setting.log


def one_line(log: str) -> str:
    """The only line of a log that is not an event."""
    (line,) = [line for line in log.splitlines() if " INFO " not in line]
    return line


def test_a_hub_killed_in_mid_stream_stores_every_report_once_and_counts_it_once(setting: Setting) -> None:
    setting.start()
    setting.wait_until_up()
    with Publisher(setting.broker_port, "d1") as one, Publisher(setting.broker_port, "d2") as two:
        wait_until(lambda: one.connected() and two.connected())
        for seq in range(1, REPORTS + 1):
            for device in (one, two):
                device.keep(fleet.report(seq))
            if seq in (50, 100, 150):
                # Not before something was stored, nor after everything was: the middle of the stream.
                wait_until(lambda seq=seq: one.acks and one.acks[-1].through_seq >= seq - 40)  # type: ignore[misc]
                setting.kill()
                setting.start()
        wait_until(lambda: not one.waiting and not two.waiting)
    assert setting.stop() == EXIT_CLEAN
    store = setting.store()
    counts = store.counts()
    assert (counts["reports"], counts["inputs"], counts["flagged"]) == (2 * REPORTS, 60 * REPORTS, 2 * REPORTS)
    rows = store.evidence(fleet.MODEL, fleet.GUARD)
    assert sum(row.inputs for row in rows) == 60 * REPORTS
    total = sum((row.flagged_sum for row in rows if row.width), start=np.zeros(fleet.WIDTH))
    np.testing.assert_allclose(total, 2 * REPORTS * np.array([1, 2, 3, 7]))


@dataclass
class Errant:
    """A device that repeats itself, sends in any order and whose clock jumps; it counts what it sends."""

    publisher: Publisher
    random: random.Random
    reports: int = 0
    inputs: int = 0
    flagged: int = 0

    def send(self, seqs: range) -> None:
        """Send reports with these numbers, and some of them twice."""
        for seq in self.random.sample(seqs, len(seqs)):
            inputs, flagged = self.random.randint(1, 50), self.random.randint(0, 1)
            at_ms = self.random.choice((0, 1, 1000 * seq, 2**53))
            made = msgspec.structs.replace(
                fleet.report(seq, counts=((0, inputs, flagged), (1, 7, 0))), started_ms=at_ms, ended_ms=2**53 - at_ms
            )
            self.publisher.keep(made)
            if self.random.random() < 0.3:
                self.publisher.send(topics.REPORT, made)
            self.reports, self.inputs = self.reports + 1, self.inputs + inputs + 7
            self.flagged += flagged


@pytest.mark.parametrize(
    ("database", "victims"),
    [
        ("sqlite", ("hub", "broker")),
        ("postgresql", ("database",)),
        ("postgresql", ("hub", "broker", "database")),
    ],
)
def test_whatever_is_killed_the_database_says_what_the_devices_counted(
    setting: Setting, mosquitto: Mosquitto, request: pytest.FixtureRequest, database: str, victims: tuple[str, ...]
) -> None:
    cluster: Postgres | None = None
    if database == "postgresql":
        cluster = request.getfixturevalue("postgres")
        url = cluster.url(cluster.create(request.getfixturevalue("template")))
        setting.more = f'[store]\nurl = "{url}"'
    setting.start()
    setting.wait_until_up()
    with ExitStack() as stack:
        devices = [
            Errant(stack.enter_context(Publisher(setting.broker_port, name)), random.Random(name))
            for name in ("d1", "d2", "d3")
        ]
        wait_until(lambda: all(device.publisher.connected() for device in devices))
        for block in range(3):
            for device in devices:
                device.send(range(40 * block + 1, 40 * block + 41))
            # In the middle of the stream: something was stored, and not everything.
            wait_until(lambda block=block: any(d.publisher.waiting < 40 * (block + 1) for d in devices))  # type: ignore[misc]
            if "hub" in victims:
                setting.kill()
            if "broker" in victims:
                mosquitto.kill()
            if cluster is not None and "database" in victims:
                cluster.kill()
                cluster.start()
            if "broker" in victims:
                mosquitto.start()
            if "hub" in victims:
                setting.start()
        wait_until(lambda: not any(device.publisher.waiting for device in devices), timeout_s=90)
    store = setting.store()
    counts = store.counts()
    assert (counts["reports"], counts["inputs"], counts["flagged"], counts["dead_letters"]) == (
        sum(device.reports for device in devices),
        sum(device.inputs for device in devices),
        sum(device.flagged for device in devices),
        0,
    )
    rows = store.evidence(fleet.MODEL, fleet.GUARD)
    for device in devices:
        mine = [row for row in rows if row.device == device.publisher.device]
        assert (sum(r.inputs for r in mine), sum(r.flagged for r in mine)) == (device.inputs, device.flagged)


def test_an_error_of_its_own_is_told_with_its_traceback_and_a_status_of_its_own(setting: Setting) -> None:
    store = setting.store()
    suspicion = Suspicion(
        model_digest=fleet.MODEL, label=1, devices=("a",), flagged=1, inputs=1, p_value=0.0, excess=1.0, channels=(),
    )  # fmt: skip
    case = cases.open_case(suspicion, model="signs", label_name="stop", at_ms=1)
    Casebook(store, clock_ms=lambda: 1).save(Move(case=case, text="seen"))
    store.close()
    with sqlite3.connect(setting.state / "hub.db") as db:
        db.execute("UPDATE cases SET detail = '{}'")
    status, log = exit_of(setting)
    assert status == EXIT_INTERNAL
    assert "Traceback" in log


@pytest.mark.parametrize("busy", [False, True])
def test_it_stops_within_seconds_when_told_to(setting: Setting, busy: bool) -> None:
    setting.start()
    setting.wait_until_up()
    with Publisher(setting.broker_port, "d1") as device:
        wait_until(device.connected)
        for seq in range(1, 2000 if busy else 2):
            device.keep(fleet.report(seq))
        began = time.monotonic()
        assert setting.stop() == EXIT_CLEAN
        assert time.monotonic() - began < 5
    assert "Traceback" not in setting.log


def test_it_serves_its_state(setting: Setting) -> None:
    setting.start()
    setting.wait_until_up()
    with Publisher(setting.broker_port, "d1") as device:
        wait_until(device.connected)
        device.send(topics.STATUS, fleet.status())
        device.keep(fleet.report(1))
        wait_until(lambda: not device.waiting)
    status = json.loads(fleet.get(setting.web_port, "/v1/status")[1])
    assert status["counts"]["reports"] == 1
    assert [(d["device"], d["state"]) for d in status["devices"]] == [("d1", "online")]
    assert status["models"][0]["model_digest"] == fleet.MODEL
    assert fleet.get(setting.web_port, "/metadata/1.root.json")[0] == 200


def test_a_hub_without_a_broker_waits_for_it(setting: Setting, mosquitto: Mosquitto) -> None:
    mosquitto.stop()
    setting.start()
    wait_until(lambda: setting.log.count("no connection to broker") >= 2)
    mosquitto.start()
    setting.wait_until_up()


def test_it_never_imports_a_training_framework() -> None:
    script = (
        "import sys, edgeguard.hub.__main__\n"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('tensorflow', 'keras', 'jax', 'torch', 'onnx', 'sklearn', 'converters', 'ai_edge_litert', 'tflite_runtime')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


class TestCheck:
    def test_all_is_well(self, setting: Setting) -> None:
        code, log = exit_of(setting, "--check")
        assert (code, log) == (EXIT_CLEAN, "")

    def test_no_broker(self, setting: Setting, mosquitto: Mosquitto) -> None:
        mosquitto.stop()
        code, log = exit_of(setting, "--check")
        assert code == EXIT_USAGE
        assert f"broker 127.0.0.1:{mosquitto.port}" in one_line(log)

    @pytest.mark.parametrize(
        ("file", "content", "word"),
        [
            ("signs.tflite", None, "signs.tflite"),
            ("signs.tflite", b"not a model", "TFL3"),
            ("signs.tflite", b"\x10\0\0\0TFL3" + b"\xff" * 64, "damaged"),
            ("keys/old.pem", b"not a key", "old.pem"),
            ("release/metadata/1.root.json", b"{}", "root"),
            ("state/hub.db", b"not a database, but longer than a header" * 10, "hub.db"),
            ("state", b"a file", "state"),
        ],
    )
    def test_a_file_that_cannot_be_used_is_named(
        self, setting: Setting, file: str, content: bytes | None, word: str
    ) -> None:
        path = setting.folder / file
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        code, log = exit_of(setting, "--check")
        assert code == EXIT_USAGE
        assert word in one_line(log)

    def test_a_port_in_use(self, setting: Setting, mosquitto: Mosquitto) -> None:
        setting.web_port = mosquitto.port
        code, log = exit_of(setting, "--check")
        assert code == EXIT_USAGE
        assert str(mosquitto.port) in one_line(log)

    def test_a_second_hub_on_the_same_state(self, setting: Setting) -> None:
        setting.start()
        setting.wait_until_up()
        first = setting._process
        setting.web_port = free_port()
        code, log = exit_of(setting, "--check")
        setting._process = first
        assert code == EXIT_USAGE
        assert "another hub" in one_line(log)

    def test_a_first_release_number_that_devices_would_never_accept(self, setting: Setting) -> None:
        text = setting.path.read_text() + "sequence = 5\n"
        path = setting.folder / "other.toml"
        path.write_text(text)
        done = _run("--config", str(path), "--check")
        assert done.returncode == EXIT_USAGE
        assert "sequence 5" in done.stderr

    def test_a_missing_configuration(self, tmp_path: Path) -> None:
        done = _run("--config", str(tmp_path / "nothing.toml"))
        assert done.returncode == EXIT_USAGE
        assert done.stderr.count("\n") == 1
        assert "nothing.toml" in done.stderr


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeguard.hub", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=dict(os.environ),
    )


def test_the_state_folder_is_open_to_its_owner_alone(setting: Setting) -> None:
    with Hub(setting.config):
        assert stat.S_IMODE(setting.state.stat().st_mode) == 0o700


def test_so_is_that_of_a_machine_that_takes_reports_alone(setting: Setting) -> None:
    command = [sys.executable, "-m", "edgeguard.hub.workers", "--config", str(setting.path)]
    (setting.folder / "signs.tflite").unlink()
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60, check=False).returncode == EXIT_USAGE
    assert stat.S_IMODE(setting.state.stat().st_mode) == 0o700
