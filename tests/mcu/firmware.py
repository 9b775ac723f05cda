"""Real firmware on an emulated Cortex-M3, by way of a real agent and a real broker, into a hub's database.

`make test-mcu` runs this file; `make test` does not, for it needs a cross compiler and an emulator (Debian:
gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm).
"""

from __future__ import annotations

import json
import re
import secrets
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.agent.spool import read_counters
from edgeguard.contract import topics
from edgeguard.contract.messages import (
    Command,
    Desired,
    Message,
    Ping,
    PingReply,
    Restart,
    RestartReply,
    decode,
    transaction,
)
from edgeguard.detection import metadata
from edgeguard.hub.ingest import Device as Row
from edgeguard.hub.listener import Listener
from edgeguard.hub.store import Store
from edgeguard.settings import BrokerConfig
from tests.agent.conftest import Device
from tests.agent.test_update_process import Site
from tests.mcu import build
from tests.mcu.build import Recording
from tests.simulators import needs
from tests.simulators.database import sqlite
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.tiny_hub import wait_until

PUMP = "gate~pump"
PART = 100
FLASH, FLASH_BYTES = 0x21001000, 4 * 128 * 1024
"""Where tests/mcu/board_an385.c keeps its four areas."""
BEGUN = 20_000
"""Bytes after which a transfer has begun in earnest, and is far from its end."""


class Emulator:
    """A board: ``port`` is a name as udev gives one, and stays."""

    def __init__(self, image: Path, port: Path) -> None:
        self._control = image.with_name("control")
        machine = ("-M", "mps2-an385", "-kernel", str(image), "-nographic", "-monitor", "none", "-serial", "pty")
        control = ("-qmp", f"unix:{self._control},server=on,wait=off")
        seed = f"loader,addr=0x21800000,data={secrets.randbits(32):#x},data-len=4"
        program = needs.program("qemu-system-arm", "qemu-system-arm")
        self._process = subprocess.Popen(
            [program, *machine, *control, "-device", seed], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        found = re.search(r"/dev/pts/\d+", self._process.stdout.readline())
        assert found is not None
        port.parent.mkdir(parents=True)
        port.symlink_to(found[0])

    def signal(self, number: int) -> None:
        """SIGSTOP lets it hang, SIGCONT go on."""
        self._process.send_signal(number)

    def reset(self) -> None:
        """The reset button: whatever the firmware was at, it starts anew."""
        self._control_with("system_reset")

    def written(self) -> int:
        """Bytes of what stands for its flash that are not erased."""
        copy = self._control.with_name("flash")
        self._control_with("pmemsave", val=FLASH, size=FLASH_BYTES, filename=str(copy))
        return int((np.fromfile(copy, np.uint8) != 0xFF).sum())

    def _control_with(self, command: str, **arguments: Any) -> None:
        """Speak QEMU's machine protocol: a greeting, then an answer to each command, events between them."""
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self._control))
            with line.makefile("rw") as control:
                control.readline()
                for message in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                    control.write(json.dumps(message) + "\n")
                    control.flush()
                    while "return" not in (answer := json.loads(control.readline())):
                        assert "error" not in answer, answer

    def end(self) -> None:
        """No power."""
        self._process.kill()
        self._process.wait(10)


class Hub:
    """The hub's listener on a database of SQLite, and what a person could ask it."""

    def __init__(self, store: Store, port: int) -> None:
        self.store = store
        self.replies: list[tuple[str, str, bytes]] = []
        self._listener = Listener(
            BrokerConfig(host="127.0.0.1", port=port),
            fleet="demo",
            client_id="Hub",
            store=store,
            models=dict,
            clock_ms=lambda: time.time_ns() // 1_000_000,
            replied=lambda *reply: self.replies.append(reply),
        )
        self._listener.start()
        wait_until(lambda: self._listener.connected, "the hub")

    def say(self, channel: str, message: Message, *, retain: bool = False) -> None:
        """Say something to the microcontroller."""
        assert self._listener.publish(PUMP, channel, message, retain=retain)

    def ask(self, command: Command, *, times: int = 1) -> bytes:
        """The microcontroller's reply to a command that is sent so often."""
        before = len(self.replies)
        for _ in range(times):
            self.say(topics.command(command.name), command)
        wait_until(lambda: len(self.replies) > before, f"a reply to {command.name}")
        device, name, payload = self.replies[-1]
        assert (device, name) == (PUMP, command.name)
        return payload

    def row(self) -> Row | None:
        """What is known of the microcontroller."""
        return next((device for device in self.store.devices() if device.device == PUMP), None)

    def state(self) -> str | None:
        row = self.row()
        return row.state if row else None

    def inputs(self) -> int:
        return self.store.counts()["inputs"]

    def counted(self, models: list[tuple[str, str]]) -> Counter[tuple[int, str]]:
        """What the database adds up to, as :func:`build.counts` has it."""
        counts: Counter[tuple[int, str]] = Counter({(-1, "not checked"): self.store.counts()["unchecked"]})
        for model in models:
            found = self.store.label_counts(*model)
            columns = (found.label.tolist(), found.inputs.tolist(), found.flagged.tolist())
            for label, inputs, flagged in zip(*columns, strict=True):
                counts[label, "flagged"] += flagged
                counts[label, "clean"] += inputs - flagged
        return +counts

    def close(self) -> None:
        self._listener.stop()


@pytest.fixture
def hub(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[Hub]:
    store = Store(sqlite(tmp_path), fleet="demo")
    one = Hub(store, mosquitto.port)
    yield one
    one.close()
    store.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    one = Site(tmp_path)
    yield one
    one.close()


@pytest.fixture
def recording(digit_models: tuple[Path, Path]) -> Recording:
    from edgeguard import data

    inputs = np.array(data.load("digits").x_test[: 4 * PART])
    inputs[::7] = 255 - inputs[::7]
    return Recording.of(digit_models[0], inputs, broken=(3, 120, 250, 330))


def offsets(log: str) -> list[int]:
    """From which bytes on the gateway says that the model goes over."""
    return [int(offset) for offset in re.findall(r"goes over from byte (\d+)", log)]


def new_id() -> str:
    return transaction(time.time_ns() // 1_000_000, secrets.token_hex(8))


def test_counts_reconcile_over_commands_a_gateway_that_dies_a_transfer_and_resets(
    hub: Hub,
    device: Callable[..., Device],
    site: Site,
    digit_models: tuple[Path, Path],
    recording: Recording,
    tmp_path: Path,
) -> None:
    port = tmp_path / "dev" / "serial" / "by-id" / "usb-Arm_MPS2_0001-if00"
    emulator = Emulator(build.firmware(tmp_path / "build", recording, part=PART), port)
    section = f'[[sources.serial]]\nname = "pump"\nport = "{port}"\nmodel = "{digit_models[0]}"\n'
    gateway = device("gate", f"[alerts]\nper_minute = 6000\n{site.config}", sources=section)
    try:
        gateway.start()
        wait_until(lambda: hub.inputs() == PART, "what the first start counted")
        assert hub.state() == "online"
        ping = decode(PingReply, hub.ask(Ping(id=new_id())))
        assert ping.state == "ok"

        gateway.kill()
        wait_until(lambda: hub.state() == "offline", "the gateway's will")
        gateway.start()
        wait_until(lambda: hub.state() == "online", "the gateway's return")

        restart = Restart(id=new_id())
        reply = hub.ask(restart, times=3)
        assert decode(RestartReply, reply).state == "ok"
        wait_until(lambda: hub.inputs() == 2 * PART, "what the second start counted")
        assert hub.ask(restart) == reply

        release = site.release(digit_models[1], digit_models[0])
        hint = Desired(target=release.target, sequence=release.sequence)
        before = emulator.written()
        hub.say(topics.MODEL_DESIRED, hint, retain=True)
        wait_until(lambda: offsets(gateway.log), "the beginning of the transfer")
        while emulator.written() < before + BEGUN:
            time.sleep(0.2)
        emulator.reset()
        wait_until(lambda: len(offsets(gateway.log)) > 1, "the transfer that goes on")
        first, second = offsets(gateway.log)
        assert first == 0
        assert second >= BEGUN // 2
        wait_until(lambda: (row := hub.row()) is not None and row.outcome == "updated", "the update", timeout_s=180)
        row = hub.row()
        assert row is not None
        assert (row.sequence, row.outcome_sequence) == (1, 1)
        assert row.model_digest == metadata.read(digit_models[1].read_bytes()).model_digest
        wait_until(lambda: hub.inputs() == 4 * PART, "what the third and the fourth start counted")

        emulator.signal(signal.SIGSTOP)
        wait_until(lambda: hub.state() == "offline", "the missed heartbeats")
        emulator.signal(signal.SIGCONT)
        wait_until(lambda: hub.state() == "online", "its return")

        wait_until(lambda: read_counters(gateway.spool).pending == 0, "an empty spool")
        assert gateway.stop() == 0
        wait_until(lambda: hub.state() == "stopped", "the gateway's goodbye")
    finally:
        emulator.end()
    metadatas = [metadata.read(path.read_bytes()) for path in digit_models]
    models = [(one.model_digest, one.guard_digest) for one in metadatas]
    assert hub.counted(models) == build.counts(recording.labels, recording.statuses)
    counts = hub.store.counts()
    flagged = recording.statuses.count("flagged")
    assert (counts["inputs"], counts["flagged"], counts["dead_letters"]) == (4 * PART, flagged, 0)
    assert 0 < counts["alerts"] <= flagged
    print(f"\n{counts}; verdicts {dict(Counter(recording.statuses))}")
