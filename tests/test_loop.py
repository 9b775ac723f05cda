"""Agent, broker and hub together, all three real, each killed once: every input is counted once, by the hub."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeguard.agent.spool import read_counters
from tests.agent.conftest import Device
from tests.simulators import fleet
from tests.simulators.attacked import Attacked
from tests.simulators.mosquitto import Mosquitto, free_port
from tests.simulators.tiny_hub import wait_until


@dataclass
class Hub:
    """The hub's process on a folder of its own."""

    folder: Path
    guarded: Path
    broker_port: int
    web_port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir()
        (self.folder / "digits.keras").touch()
        # So many flagged inputs are needed for a suspicion that this hub never starts a repair.
        (self.folder / "hub.toml").write_text(
            f'fleet = "demo"\nstate_dir = "state"\n[broker]\nhost = "127.0.0.1"\nport = {self.broker_port}\n'
            f'[web]\nport = {self.web_port}\nanonymous = "viewer"\n'
            "[policy]\nmin_flagged = 1000000\n"
            f'[[models]]\nname = "digits"\nguarded = "{self.guarded}"\nkeras = "digits.keras"\ndata = "digits"\n'
        )

    def start(self) -> None:
        """Start the process and wait until it serves."""
        with (self.folder / "stderr.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edgeguard.hub", "--config", str(self.folder / "hub.toml")], stderr=log
            )
        wait_until(self._serves, "a hub that serves")

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        return self._end(signal.SIGTERM)

    def stored(self) -> dict[str, int]:
        """What its database holds, summed there and then over the rows."""
        with closing(sqlite3.connect(self.folder / "state" / "hub.db")) as db:
            row = db.execute(
                "SELECT COUNT(*), TOTAL(inputs), TOTAL(flagged), COUNT(DISTINCT boot) FROM reports"
            ).fetchone()
        return dict(zip(("reports", "inputs", "flagged", "boots"), row, strict=True))

    def _serves(self) -> bool:
        try:
            return fleet.get(self.web_port, "/v1/status")[0] == 200
        except OSError:
            return False

    def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        return process.wait(15)


@pytest.fixture
def hub(tmp_path: Path, mosquitto: Mosquitto, guarded_file: Path) -> Iterator[Hub]:
    one = Hub(tmp_path / "hub", guarded_file, mosquitto.port)
    yield one
    one.kill()


@pytest.fixture
def camera(tmp_path: Path, mosquitto: Mosquitto, guarded_file: Path) -> Iterator[Device]:
    one = Device(tmp_path / "camera-1", "camera-1", guarded_file, mosquitto.port, window="inputs = 16\nseconds = 0.5")
    yield one
    one.end()


@pytest.fixture
def inputs(attacked: Attacked) -> npt.NDArray[Any]:
    """Clean and triggered inputs, mixed."""
    clean = attacked.data.x_test[:360].astype(np.uint8)
    mixed: npt.NDArray[Any] = np.concatenate([clean, attacked.attack.stamp(clean[:40])])
    return np.tile(mixed[np.random.default_rng(0).permutation(len(mixed))], (3, 1, 1, 1))


def feed_until_it_flows(camera: Device, hub: Hub, inputs: npt.NDArray[Any]) -> int:
    """Feed until new reports reach the hub, and then some that are surely still waiting; the number of inputs fed."""
    before, fed = hub.stored()["reports"], 0

    def flows() -> bool:
        nonlocal fed
        if camera.waiting() < 20:
            fed += camera.feed(inputs, batch=4)
        return hub.stored()["reports"] >= before + 5

    wait_until(flows, "reports of this stream at the hub")
    return fed + camera.feed(inputs, batch=4)


def test_each_part_killed_once_and_every_input_is_counted_once_by_the_hub(
    mosquitto: Mosquitto, hub: Hub, camera: Device, inputs: npt.NDArray[Any]
) -> None:
    hub.start()
    camera.start()
    fed = 0
    for victim in (mosquitto, hub, camera):
        fed += feed_until_it_flows(camera, hub, inputs)
        victim.kill()
        assert camera.waiting() > 0, "the kill came too late to show anything"
        victim.start()
    wait_until(lambda: camera.waiting() == 0, "an empty inbox")
    assert camera.stop() == 0
    assert hub.stop() == 0
    stored, counters = hub.stored(), read_counters(camera.spool)
    assert stored["inputs"] == fed
    assert stored["reports"] == counters.reports_total
    assert (counters.pending, counters.dropped_total) == (0, 0)
    assert stored["boots"] == 2
    assert stored["flagged"] > 0
