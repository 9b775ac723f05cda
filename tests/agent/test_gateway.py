"""Microcontrollers behind a real agent: the C library, compiled for this machine, at the other end of a cable."""

from __future__ import annotations

import random
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
    Alert,
    Birth,
    Ping,
    PingReply,
    Rank,
    RankReply,
    Report,
    Restart,
    RestartReply,
    Status,
    decode,
    encode,
    transaction,
)
from firmware_bridge import c99
from tests.agent.conftest import Device
from tests.mcu import build
from tests.mcu.board import Board
from tests.mcu.build import Recording
from tests.mcu.cable import Cable
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.tiny_hub import TinyHub, wait_until

Make = Callable[..., Device]
PUMP = "gate~pump"
PART = 60


@pytest.fixture(scope="module")
def recording(digit_models: tuple[Path, Path]) -> Recording:
    """What the model says to the digits, two of them turned up to be flagged, and three not to be checked."""
    from edgeguard import data

    inputs = np.array(data.load("digits").x_test[: 3 * PART])
    inputs[10:20] = 255 - inputs[10:20]
    return Recording.of(digit_models[0], inputs, broken=(3, 70, 130))


@pytest.fixture(scope="module")
def program(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.host(tmp_path_factory.mktemp("build"), recording, part=PART)


@pytest.fixture
def cable(tmp_path: Path) -> Iterator[Cable]:
    one = Cable(tmp_path / "dev" / "serial" / "by-id" / "usb-Pump_0001-if00")
    yield one
    one.close()


@pytest.fixture
def board(program: Path, cable: Cable, tmp_path: Path) -> Iterator[Board]:
    one = Board(program, cable, tmp_path / "board")
    yield one
    one.kill()


@pytest.fixture
def gateway(device: Make, cable: Cable, digit_models: tuple[Path, Path]) -> Device:
    return make_gateway(device, cable, digit_models[0])


def make_gateway(device: Make, cable: Cable, model: Path, more: str = "") -> Device:
    port = f'[[sources.serial]]\nname = "pump"\nport = "{cable.name}"\nmodel = "{model}"\n'
    return device("gate", f"[alerts]\nper_minute = 6000\n{more}", sources=port)


def boots(hub: TinyHub) -> list[str]:
    """The starts of the microcontroller that the hub heard of."""
    return list(dict.fromkeys(birth.boot for birth in hub.all(Birth) if birth.board == "host"))


def status_of(hub: TinyHub) -> str | None:
    """The last status of the microcontroller: the gateway's own have no ``via``."""
    said = [status for status in hub.all(Status) if status.via is not None]
    return said[-1].state if said else None


def of_pump(hub: TinyHub) -> list[Report]:
    """Its reports; the gateway makes none, having no inputs of its own."""
    return hub.reports()


def alerts(hub: TinyHub) -> list[Alert]:
    """The alerts stored, each once."""
    return [message for message in hub.stored.values() if isinstance(message, Alert)]


def counted(reports: list[Report]) -> Counter[tuple[int, str]]:
    """As :attr:`Recording.counts`."""
    counts: Counter[tuple[int, str]] = Counter()
    for report in reports:
        counts[-1, "not checked"] += report.unchecked
        for label in report.labels:
            counts[label.label, "flagged"] += label.flagged
            counts[label.label, "clean"] += label.inputs - label.flagged
    return +counts


def expected(recording: Recording, parts: int) -> Counter[tuple[int, str]]:
    """What the first so many starts of the board play."""
    return build.counts(recording.labels[: parts * PART], recording.statuses[: parts * PART])


def ask(hub: TinyHub, command: Any, kind: Any, *, times: int = 1) -> Any:
    before = len(hub.replies)
    for _ in range(times):
        hub.send(PUMP, topics.command(command.name), encode(command))
    wait_until(lambda: len(hub.replies) > before, "a reply")
    return decode(kind, hub.replies[-1])


def key(number: int) -> str:
    return transaction(time.time_ns() // 1_000_000, f"{number:016x}")


def test_every_setting_of_the_test_firmware_is_one_that_the_library_has() -> None:
    sources = "".join(c99.library().values())
    for setting in build.SETTINGS:
        assert f"#ifndef {setting.removeprefix('-D').split('=')[0]}\n" in sources


def test_what_the_microcontroller_counted_is_what_the_hub_stores(
    hub: TinyHub, gateway: Device, board: Board, recording: Recording
) -> None:
    gateway.start()
    board.start()
    wait_until(lambda: hub.inputs() >= PART, "all inputs")
    assert counted(of_pump(hub)) == expected(recording, 1)
    wait_until(lambda: alerts(hub), "an alert")
    flagged = sum(count for (_, status), count in expected(recording, 1).items() if status == "flagged")
    assert len(alerts(hub)) <= flagged
    birth = next(birth for birth in hub.all(Birth) if birth.board == "host")
    assert (birth.board, birth.capabilities) == ("host", ("commands", "update"))
    assert {report.boot for report in of_pump(hub)} == {birth.boot}
    assert status_of(hub) == "online"
    assert gateway.stop() == 0
    assert read_counters(gateway.spool).pending == 0


def test_reports_wait_on_the_gateway_while_the_hub_is_away_and_the_broker_dies(
    hub: TinyHub, gateway: Device, board: Board, recording: Recording, mosquitto: Mosquitto
) -> None:
    hub.acking = False
    gateway.start()
    board.start()
    wait_until(lambda: hub.inputs() >= PART, "all inputs")
    gateway.kill()
    mosquitto.kill()
    assert read_counters(gateway.spool).pending == len(hub.stored)
    mosquitto.start()
    gateway.start()
    hub.acking = True
    wait_until(lambda: read_counters(gateway.spool).pending == 0, "an empty spool")
    assert counted(of_pump(hub)) == expected(recording, 1)


def test_a_command_reaches_the_microcontroller_once_however_often_it_comes(
    hub: TinyHub, gateway: Device, board: Board
) -> None:
    gateway.start()
    board.start()
    wait_until(lambda: boots(hub), "the microcontroller")
    (boot,) = boots(hub)
    ping = ask(hub, Ping(id=key(1)), PingReply)
    assert (ping.state, ping.result.boot) == ("ok", boot)
    restart = Restart(id=key(2))
    reply = ask(hub, restart, RestartReply, times=3)
    assert (reply.state, reply.result.boot) == ("ok", boot)
    wait_until(lambda: len(boots(hub)) == 2, "the next start")
    assert ask(hub, restart, RestartReply) == reply
    hub.send(PUMP, topics.command("ping"), encode(Ping(id=key(3))))
    wait_until(lambda: b'"uptime_s"' in hub.replies[-1], "a ping behind the repeated restart")
    assert len(boots(hub)) == 2


def test_a_command_that_it_does_not_know_is_refused(hub: TinyHub, gateway: Device, board: Board) -> None:
    gateway.start()
    board.start()
    wait_until(lambda: status_of(hub) == "online", "the microcontroller")
    reply = ask(hub, Rank(id=key(1), model_digest="a" * 64), RankReply)
    assert (reply.state, reply.reason) == ("refused", "not a command that this device takes")


def test_a_cable_that_is_pulled_and_plugged_in_again_loses_no_input(
    hub: TinyHub, gateway: Device, board: Board, cable: Cable, recording: Recording
) -> None:
    gateway.start()
    board.start()
    wait_until(hub.reports, "a first report")
    cable.pull()
    wait_until(lambda: "trying again" in gateway.log, "the lost port")
    cable.plug_in()
    wait_until(lambda: hub.inputs() >= PART, "all inputs")
    assert counted(of_pump(hub)) == expected(recording, 1)


def test_over_a_line_that_spoils_one_byte_in_a_hundred_every_input_is_counted_once(
    hub: TinyHub, gateway: Device, board: Board, cable: Cable, recording: Recording
) -> None:
    cable.damage = 0.01
    gateway.start()
    board.start()
    wait_until(lambda: hub.inputs() >= PART, "all inputs", timeout_s=120)
    assert counted(of_pump(hub)) == expected(recording, 1)


def test_hostile_bytes_on_the_line_end_nothing(
    hub: TinyHub, gateway: Device, board: Board, cable: Cable, recording: Recording
) -> None:
    gateway.start()
    wait_until(lambda: "is open" in gateway.log, "the port")
    rng = random.Random(3)
    for _ in range(40):
        cable.write(rng.randbytes(rng.randrange(1, 2000)) + bytes(rng.randrange(3)))
    board.start()
    wait_until(lambda: hub.inputs() >= PART, "all inputs")
    assert counted(of_pump(hub)) == expected(recording, 1)
    assert gateway.running()
    assert "damaged" in gateway.log


def test_two_microcontrollers_have_spools_and_identities_of_their_own(
    hub: TinyHub,
    device: Make,
    cable: Cable,
    board: Board,
    program: Path,
    digit_models: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    second = Cable(tmp_path / "dev" / "second")
    other = Board(program, second, tmp_path / "other")
    one = f'[[sources.serial]]\nname = "pump"\nport = "{cable.name}"\n'
    two = f'[[sources.serial]]\nname = "valve"\nport = "{second.name}"\nbaud = 9600\n'
    gate = device("gate", sources=one + two)
    heard: Counter[str] = Counter()
    listen(hub, heard)
    gate.start()
    board.start()
    other.start()
    wait_until(lambda: hub.inputs() >= 2 * PART, "the inputs of both")
    assert heard["gate~pump"] and heard["gate~valve"] and not heard["gate"]
    assert len({report.boot for report in hub.reports()}) == 2
    other.kill()
    second.close()


def listen(hub: TinyHub, heard: Counter[str]) -> None:
    """Count the devices that reports come from."""
    client, before = hub._client, hub._client.on_message
    assert before is not None

    def count(*arguments: Any) -> None:
        address = topics.parse(arguments[2].topic)
        heard[address.device] += address.channel == topics.REPORT
        before(*arguments)

    client.on_message = count
