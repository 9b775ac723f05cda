"""Processes that take reports from one shared subscription: started, killed, replaced, and killed for good."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from edgeguard.contract import topics
from edgeguard.errors import EXIT_CLEAN, EXIT_USAGE
from edgeguard.hub import config as configs
from edgeguard.hub import workers
from edgeguard.hub.config import HubConfig, IngestConfig
from edgeguard.hub.ingest import ModelShape
from edgeguard.hub.ingest_worker import Assignment
from edgeguard.hub.store import Store
from edgeguard.hub.workers import COMMAND, Supervisor
from edgeguard.settings import BrokerConfig
from tests.hub.conftest import Setting
from tests.simulators import fleet
from tests.simulators.fleet import Publisher, wait_until
from tests.simulators.mosquitto import Mosquitto

MODELS = {fleet.MODEL: ModelShape(width=fleet.WIDTH, classes=2)}
DEVICES = tuple(f"d{i}" for i in range(6))
LIMITS = IngestConfig(ack_every_s=0.1)


@pytest.fixture
def worker(mosquitto: Mosquitto, database: str) -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    """Starts single workers that nobody restarts."""
    Store(database, fleet="test").close()
    running: list[subprocess.Popen[bytes]] = []

    def start(number: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        running.append(process)
        order = Assignment(
            broker=BrokerConfig(host="127.0.0.1", port=mosquitto.port), fleet="test", client_id=f"hub-{number}",
            store_url=database, limits=LIMITS, models=MODELS,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(order, enc_hook=str) + b"\n")
        process.stdin.flush()
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def supervised(setting: Setting, count: int) -> Supervisor:
    config = workers.with_workers(setting.config, count)
    setting.state.mkdir(exist_ok=True)
    return Supervisor(config, models=MODELS)


@pytest.fixture
def devices(mosquitto: Mosquitto) -> Iterator[list[Publisher]]:
    with ExitStack() as stack:
        made = [stack.enter_context(Publisher(mosquitto.port, name)) for name in DEVICES]
        wait_until(lambda: all(one.connected() for one in made))
        yield made


def reconcile(store: Store, devices: list[Publisher], reports: int) -> None:
    """Wait until no device holds anything, and hold the database against what the devices sent."""
    wait_until(lambda: not any(device.waiting for device in devices), timeout_s=60)
    counts = store.counts()
    total = reports * len(devices)
    assert (counts["reports"], counts["inputs"], counts["flagged"]) == (total, 30 * total, total)
    assert counts["dead_letters"] == 0
    rows = store.evidence(fleet.MODEL, fleet.GUARD)
    assert {name: sum(r.inputs for r in rows if r.device == name) for name in DEVICES} == dict.fromkeys(
        DEVICES, 30 * reports
    )


def test_one_of_two_that_dies_for_good_under_load_loses_nothing(
    worker: Callable[[int], subprocess.Popen[bytes]], database: str, devices: list[Publisher]
) -> None:
    store = Store(database, fleet="test")
    pair = [worker(0), worker(1)]
    devices[0].keep(fleet.report(1))
    wait_until(lambda: not devices[0].waiting)
    for seq in range(1, 61):
        for device in devices:
            if (device, seq) != (devices[0], 1):
                device.keep(fleet.report(seq))
        if seq == 20:
            wait_until(lambda: store.counts()["reports"] > 20)
            pair[1].kill()
    reconcile(store, devices, 60)
    assert pair[0].poll() is None


def test_a_worker_that_dies_is_replaced_and_takes_up_its_session(setting: Setting, devices: list[Publisher]) -> None:
    store = setting.store()
    supervisor = supervised(setting, 2)
    supervisor.start()
    try:
        for seq in range(1, 61):
            for device in devices:
                device.keep(fleet.report(seq))
            if seq in (20, 40):
                wait_until(lambda seq=seq: store.counts()["reports"] >= seq)  # type: ignore[misc]
                before = supervisor.processes
                os.kill(before[seq // 20 - 1], signal.SIGKILL)
        reconcile(store, devices, 60)
        assert len(supervisor.processes) == 2
    finally:
        supervisor.stop()
    assert supervisor.processes == {}
    assert supervisor.totals.taken > 0


def test_workers_are_told_of_new_models(setting: Setting, devices: list[Publisher]) -> None:
    store = setting.store()
    supervisor = supervised(setting, 1)
    supervisor.start()
    try:
        supervisor.tell(MODELS | {fleet.OTHER: ModelShape(width=9, classes=2)})
        wait_until(lambda: supervisor.processes)
        devices[0].keep(fleet.report(1, model=fleet.OTHER, width=9))
        wait_until(lambda: not devices[0].waiting)
        devices[0].keep(fleet.report(2, model=fleet.OTHER, width=4))
        wait_until(lambda: not devices[0].waiting)
        assert (store.counts()["reports"], store.counts()["dead_letters"]) == (1, 1)
    finally:
        supervisor.stop()


def test_sessions_of_workers_that_are_no_longer_wanted_are_ended(setting: Setting, devices: list[Publisher]) -> None:
    three = supervised(setting, 3)
    three.start()
    wait_until(lambda: (setting.state / "workers").exists() and len(three.processes) == 3)
    devices[0].keep(fleet.report(1))
    wait_until(lambda: not devices[0].waiting)
    three.stop()
    one = supervised(setting, 1)
    one.start()
    try:
        wait_until(lambda: (setting.state / "workers").read_text() == "1\n")
        for seq in range(2, 42):
            devices[0].send(topics.REPORT, fleet.report(seq))  # once: none may be shared out to a session of nobody
        wait_until(lambda: setting.store().counts()["reports"] == 41)
    finally:
        one.stop()


def test_a_hub_with_workers_stores_reports_and_knows_its_devices(setting: Setting, devices: list[Publisher]) -> None:
    setting.start("--workers", "2")
    setting.wait_until_up()
    for device in devices:
        device.send(topics.STATUS, fleet.status())
        for seq in range(1, 21):
            device.keep(fleet.report(seq))
    store = setting.store()
    reconcile(store, devices, 20)
    wait_until(lambda: [d.state for d in store.devices()] == ["online"] * len(DEVICES))
    assert setting.stop() == EXIT_CLEAN
    assert "Traceback" not in setting.log


def test_a_machine_may_take_reports_and_do_nothing_else(setting: Setting, devices: list[Publisher]) -> None:
    store = setting.store()
    command = [sys.executable, "-m", "edgeguard.hub.workers", "--config", str(setting.path), "--workers", "1"]
    process = subprocess.Popen(command)
    try:
        devices[0].keep(fleet.report(1))
        wait_until(lambda: not devices[0].waiting)
        assert store.counts()["reports"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == EXIT_CLEAN
    finally:
        process.kill()


def test_what_is_wrong_with_its_configuration_is_told_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeguard.hub.workers", "--config", str(tmp_path / "nothing.toml")],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (EXIT_USAGE, 1)


def test_the_number_of_workers_is_a_setting() -> None:
    raw = {"fleet": "test", "state_dir": "s", "broker": {"host": "h"}, "ingest": {"workers": 3}}
    config: HubConfig = configs.parse(raw, base=Path("/"))
    assert [workers.client_id(config, number) for number in range(config.ingest.workers)] == [
        "edgeguard-hub-0", "edgeguard-hub-1", "edgeguard-hub-2",
    ]  # fmt: skip
