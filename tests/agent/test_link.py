"""The link to the broker: sessions and wills, reconnecting, and which message is sent when."""

from __future__ import annotations

import itertools
import random
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, cast

import pytest

from edgeguard.agent import link as link_module
from edgeguard.agent.link import Connected, Event, For, Hint, Link, Lost, Outflow, backoff
from edgeguard.agent.spool import Entry
from edgeguard.contract import topics
from edgeguard.contract.messages import (
    COMMANDS,
    MAX_COMMAND,
    MAX_PAYLOAD,
    Ack,
    Command,
    Desired,
    Ping,
    Rank,
    Recalibrate,
    Restart,
    Status,
    Vote,
    encode,
)
from edgeguard.settings import BrokerConfig
from tests.simulators.mosquitto import Mosquitto, free_port
from tests.simulators.tiny_hub import TinyHub, wait_until

BOOT = "00000000000000aa"


BOTH = pytest.mark.parametrize("link", ["3.1.1", "5"], indirect=True)
"""What must hold with either version of MQTT."""


def make(port: int, *, protocol: str = "3.1.1") -> Link:
    counter = itertools.count(1)
    return Link(
        BrokerConfig(host="127.0.0.1", port=port, protocol=cast(Any, protocol)),
        fleet="demo",
        device="camera-1",
        boot=BOOT,
        next_session=lambda: next(counter),
    )


def next_event(link: Link, kind: type[Event] | UnionType) -> Event:
    found: list[Event] = []

    def arrived() -> bool:
        found.extend(event for event in link.poll(0.02) if isinstance(event, kind))
        return bool(found)

    wait_until(arrived, str(kind))
    return found[0]


@pytest.fixture
def link(mosquitto: Mosquitto, request: pytest.FixtureRequest) -> Iterator[Link]:
    one = make(mosquitto.port, protocol=getattr(request, "param", "3.1.1"))
    yield one
    one.close()


@BOTH
def test_a_connection_has_the_number_of_its_attempt(link: Link) -> None:
    assert next_event(link, Connected) == Connected(session=1)
    assert link.connected


@BOTH
def test_a_broker_that_is_down_is_tried_until_it_is_there(mosquitto: Mosquitto, link: Link) -> None:
    mosquitto.stop()
    lost = next_event(link, Lost)
    assert isinstance(lost, Lost) and "refused" in lost.reason
    next_event(link, Lost)
    mosquitto.start()
    connected = next_event(link, Connected)
    assert isinstance(connected, Connected)
    assert connected.session == link.session >= 3


@BOTH
def test_each_reconnection_is_a_new_session(mosquitto: Mosquitto, link: Link) -> None:
    first = next_event(link, Connected)
    mosquitto.kill()
    next_event(link, Lost)
    assert not link.connected
    mosquitto.start()
    again = next_event(link, Connected)
    assert isinstance(first, Connected) and isinstance(again, Connected)
    assert again.session > first.session


def test_what_a_former_connection_still_says_does_not_end_the_present_one(link: Link) -> None:
    next_event(link, Connected)
    link._inbox.put((link.session - 1, Lost("late news")))
    assert link.poll(0.2) == []
    assert link.connected


@BOTH
def test_the_will_fires_with_the_session_of_its_connection(hub: TinyHub, mosquitto: Mosquitto, link: Link) -> None:
    next_event(link, Connected)
    # A second connection of the same device: the broker ends the first one and sends its will.
    second = make(mosquitto.port)
    next_event(second, Connected)
    wait_until(lambda: hub.latest(Status), "the will")
    assert hub.latest(Status) == Status(state="offline", session=1, boot=BOOT)
    second.close()


@pytest.mark.parametrize("protocol", ["3.1.1", "5"])
def test_closing_says_stopped_and_fires_no_will(hub: TinyHub, mosquitto: Mosquitto, protocol: str) -> None:
    link = make(mosquitto.port, protocol=protocol)
    next_event(link, Connected)
    link.close()
    wait_until(lambda: hub.latest(Status), "a status")
    hub.send("camera-1", topics.STATUS, encode(Status(state="online", session=99, boot=BOOT)))
    wait_until(lambda: len(hub.said) == 2, "the message that closes the experiment")
    assert [m.state for m in hub.said if isinstance(m, Status)] == ["stopped", "online"]


def test_a_certificate_that_is_gone_when_it_is_needed_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = BrokerConfig(host="127.0.0.1", port=free_port(), ca=tmp_path / "ca.pem")
    link = Link(broker, fleet="demo", device="camera-1", boot=BOOT, next_session=itertools.count(1).__next__)
    wait_until(lambda: link.poll(0.02) or len(caplog.records) == 2, "the second attempt")
    assert all(f"broker.ca {broker.ca}" in record.getMessage() for record in caplog.records)
    link.close()


def test_closing_without_a_connection_returns() -> None:
    link = make(free_port())
    link.poll()
    link.close()


@BOTH
def test_acks_and_hints_arrive_as_events(hub: TinyHub, link: Link) -> None:
    next_event(link, Connected)
    ack, desired = Ack(boot=BOOT, through_seq=3), Desired(target="m-2.tflite", sequence=2)
    wait_until(lambda: not link.poll(0.05), "quiet")
    hub.send("camera-1", topics.ACK, encode(ack))
    assert next_event(link, Ack) == ack
    hub.hint("camera-1", desired.target, desired.sequence)
    assert next_event(link, Hint) == Hint(desired, fresh=True)


@BOTH
def test_a_retained_hint_is_told_from_a_fresh_one(hub: TinyHub, link: Link) -> None:
    hub.hint("camera-1", "m-2.tflite", 2)
    hint = next_event(link, Hint)
    assert isinstance(hint, Hint) and not hint.fresh


@pytest.mark.parametrize("channel", [topics.ACK, topics.MODEL_DESIRED])
@pytest.mark.parametrize(
    "payload",
    [b"{", b"[]", b'{"v":2,"boot":"00000000000000aa","through_seq":1}', b"\xff", b'{"target":"../x","sequence":1}'],
)
def test_a_hostile_payload_is_ignored_and_the_link_lives(
    hub: TinyHub, link: Link, channel: str, payload: bytes
) -> None:
    next_event(link, Connected)
    hub.send("camera-1", channel, payload)
    good = Ack(boot=BOOT, through_seq=1)
    hub.send("camera-1", topics.ACK, encode(good))
    assert next_event(link, Ack) == good


def test_a_message_of_another_version_is_told_by_its_number(
    hub: TinyHub, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    next_event(link, Connected)
    hub.send("camera-1", topics.ACK, b'{"v":2,"boot":"00000000000000aa","through_seq":1}')
    wait_until(lambda: "Ack message; got version 2; expected version 1" in caplog.text, "the line in the log")
    assert link.connected


ID = "0199f0c5a1b20123"
ORDERS: tuple[Command, ...] = (
    Ping(id=ID),
    Restart(id=ID),
    Rank(id=ID, model_digest="a" * 64),
    Vote(id=ID, model_digest="a" * 64, layer="conv_2", share=0.1),
    Recalibrate(id=ID, source="owner"),
)


@BOTH
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
def test_a_command_arrives_as_an_event_of_its_topics_kind(hub: TinyHub, link: Link, order: Command) -> None:
    next_event(link, Connected)
    hub.send("camera-1", topics.command(order.name), encode(order))
    found = next_event(link, Command)
    assert (type(found), found) == (COMMANDS[order.name], order)


@BOTH
def test_a_reply_can_be_published_on_its_channel(hub: TinyHub, link: Link, mosquitto: Mosquitto) -> None:
    heard: list[tuple[str, bytes]] = []
    hub._client.on_message = lambda _c, _u, message: heard.append((message.topic, bytes(message.payload)))
    next_event(link, Connected)
    for name in COMMANDS:
        link.publish(topics.reply(name), b"reply")
    wait_until(lambda: len(heard) == len(COMMANDS), "the replies")
    assert heard == [(f"edgeguard/v1/demo/camera-1/reply/{name}", b"reply") for name in COMMANDS]


@pytest.mark.parametrize(
    ("device", "channel", "payload"),
    [
        ("camera-1", "cmd/shell", encode(Ping(id=ID))),
        ("camera-1", "cmd/rank", encode(Ping(id=ID))),
        ("camera-1", "cmd/ping", encode(Ping(id="short"))),
        ("camera-1", "cmd/ping", encode(Ping(id=ID)).ljust(MAX_COMMAND + 1)),
        ("camera-1", "cmd/ping/more", encode(Ping(id=ID))),
        ("camera-1", "cmd", encode(Ping(id=ID))),
        ("camera-1", "reply/ping", encode(Ping(id=ID))),
        ("camera-2", "cmd/ping", encode(Ping(id=ID))),
    ],
)
def test_what_is_no_command_to_this_device_is_none(
    hub: TinyHub, link: Link, device: str, channel: str, payload: bytes
) -> None:
    next_event(link, Connected)
    hub.send(device, channel, payload)
    hub.send("camera-1", "cmd/ping", encode(Ping(id="f" * 16)))
    assert next_event(link, Command) == Ping(id="f" * 16)


@BOTH
def test_a_retained_command_is_not_executed_by_whoever_comes_later(hub: TinyHub, link: Link) -> None:
    hub.send("camera-1", "cmd/restart", encode(Restart(id=ID)), retain=True)
    next_event(link, Connected)
    hub.send("camera-1", "cmd/ping", encode(Ping(id=ID)))
    assert next_event(link, Command) == Ping(id=ID)


def test_a_flood_is_one_line_in_the_log(hub: TinyHub, link: Link, caplog: pytest.LogCaptureFixture) -> None:
    next_event(link, Connected)
    for _ in range(20):
        hub.send("camera-1", "cmd/ping", b"\x1b[31m{")
    hub.send("camera-1", "cmd/ping", encode(Ping(id=ID)))
    next_event(link, Command)
    lines = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert len(lines) == 1 and lines[0].isprintable()


def test_what_waits_for_the_agent_is_bounded(
    hub: TinyHub, link: Link, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(link_module, "MAX_WAITING", 5)
    next_event(link, Connected)
    for number in range(20):
        hub.send("camera-1", "cmd/ping", encode(Ping(id=f"{number:016x}")))
    wait_until(lambda: "messages wait" in caplog.text, "the first that is ignored")
    assert len(link.poll()) == 5
    assert link.connected


def publish(topic: bytes, payload: bytes, *, flags: int = 0x02) -> bytes:
    """A PUBLISH packet of MQTT 3.1.1 (section 3.3), QoS 1 unless ``flags`` say otherwise."""
    rest = len(topic).to_bytes(2, "big") + topic + (b"\x00\x07" if flags & 0x06 else b"") + payload
    return bytes([0x30 | flags]) + length(len(rest)) + rest


def length(number: int) -> bytes:
    """MQTT's variable-length integer."""
    encoded = bytearray()
    while True:
        number, digit = divmod(number, 128)
        encoded.append(digit | (0x80 if number else 0))
        if not number:
            return bytes(encoded)


class Liar:
    """A broker of a few lines: it takes one connection and its subscription, and says what a test makes it say."""

    def __init__(self, say: Callable[[socket.socket], None], *, granted: bytes = b"\x01\x01\x01") -> None:
        self._say = say
        self._granted = granted
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self._server.accept()
        with connection, self._server, suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"\x20\x02\x00\x00")
            subscribe = connection.recv(65536)
            answer = subscribe[2:4] + self._granted
            connection.sendall(b"\x90" + length(len(answer)) + answer)
            self._say(connection)
            while connection.recv(65536):
                pass


PING = b"edgeguard/v1/demo/camera-1/cmd/ping"


@pytest.mark.parametrize(
    "packet",
    [
        publish(b"\xff\xfe", b"{}"),
        publish(PING + b"\x00", encode(Ping(id=ID))),
        publish(PING, encode(Ping(id=ID)), flags=0x03),
        publish(PING, b""),
    ],
    ids=["not UTF-8", "NUL in the topic", "retained", "empty"],
)
def test_a_packet_that_no_honest_broker_sends_costs_itself_alone(packet: bytes) -> None:
    good = Ping(id="f" * 16)
    broker = Liar(lambda connection: connection.sendall(packet + publish(PING, encode(good))))
    link = make(broker.port)
    assert next_event(link, Command) == good
    link.close(wait_s=0)


def test_a_command_that_says_it_is_a_duplicate_arrives_for_nobody_knows_if_the_first_one_did() -> None:
    broker = Liar(lambda connection: connection.sendall(publish(PING, encode(Ping(id=ID)), flags=0x0A)))
    link = make(broker.port)
    assert next_event(link, Command) == Ping(id=ID)
    link.close(wait_s=0)


def test_a_packet_of_many_megabytes_takes_neither_memory_nor_the_connection() -> None:
    size = 64 << 20
    good = Ping(id="f" * 16)

    def flood(connection: socket.socket) -> None:
        zeros = bytes(1 << 16)
        rest = len(PING).to_bytes(2, "big") + PING + b"\x00\x07"
        connection.sendall(b"\x32" + length(len(rest) + size) + rest)
        for _ in range(size // len(zeros)):
            connection.sendall(zeros)
        connection.sendall(publish(PING, encode(good)))

    link = make(Liar(flood).port)
    tracemalloc.start()
    try:
        assert next_event(link, Command) == good
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert link.session == 1
    assert peak < 8 << 20
    link.close(wait_s=0)


def test_a_broker_that_grants_no_commands_still_gets_reports(caplog: pytest.LogCaptureFixture) -> None:
    link = make(Liar(lambda _: None, granted=b"\x01\x01\x80").port)
    next_event(link, Connected)
    assert link.connected and "commands" in caplog.text
    link.close(wait_s=0)


@pytest.mark.parametrize("granted", [b"\x80\x01\x01", b"\x01\x80\x01"])
def test_a_broker_that_grants_no_acks_or_hints_is_no_connection(granted: bytes) -> None:
    link = make(Liar(lambda _: None, granted=granted).port)
    lost = next_event(link, Lost)
    assert isinstance(lost, Lost) and lost.reason.startswith("subscription refused: ")
    assert "Unspecified error" in lost.reason
    link.close(wait_s=0)


def test_a_peer_that_is_no_broker_is_lost_and_tried_again(link: Link) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        confused = make(server.getsockname()[1])
        next_event(confused, Lost)
        next_event(confused, Lost)
        confused.close()


def liar_5(
    *,
    connack: bytes = b"\x00\x00\x00",
    suback: bytes = b"\x01\x01\x01",
    packet: bytes = b"",
    heard: list[bytes] | None = None,
) -> int:
    """The port of a broker of MQTT 5 that takes one connection, answers so, says ``packet``, and then only listens."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        with connection, server, suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"\x20" + length(len(connack)) + connack)
            answer = connection.recv(65536)[2:4] + b"\x00" + suback
            connection.sendall(b"\x90" + length(len(answer)) + answer + packet)
            while piece := connection.recv(65536):
                if heard is not None:
                    heard.append(piece)

    threading.Thread(target=serve, daemon=True).start()
    port: int = server.getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ({"connack": b"\x00\x84\x00"}, "refused: Unsupported protocol version"),
        ({"connack": b"\x00\x8a\x00"}, "refused: Banned"),
        ({"suback": b"\x87\x01\x01"}, "subscription refused: Not authorized"),
        ({"packet": b"\xe0\x02\x97\x00"}, "Quota exceeded"),
        ({"packet": b"\x32\x02\x00\x09"}, ""),
    ],
    ids=["old broker", "banned", "no acks", "quota", "malformed"],
)
def test_a_broker_of_mqtt_5_says_why_there_is_no_connection(says: dict[str, Any], reason: str) -> None:
    link = make(liar_5(**says), protocol="5")
    lost = next_event(link, Lost)
    assert isinstance(lost, Lost) and lost.reason.startswith(reason)
    link.close(wait_s=0)


def test_a_damaged_packet_of_mqtt_5_costs_itself_or_the_connection_and_no_more() -> None:
    good = Ping(id=ID)
    rest = len(PING).to_bytes(2, "big") + PING + b"\x00\x07" + b"\x00" + encode(good)
    numbers = random.Random(5)
    outcomes = set()
    for _ in range(40):
        damaged = bytearray(rest)
        for _ in range(numbers.randint(1, 4)):
            damaged[numbers.randrange(len(PING) + 8)] = numbers.randrange(256)
        packet = b"\x32" + length(len(damaged)) + bytes(damaged) + b"\x32" + length(len(rest)) + rest
        link = make(liar_5(packet=packet), protocol="5")
        event = next_event(link, Lost | Command)
        outcomes.add(type(event))
        assert isinstance(event, Lost) or event == good
        link.close(wait_s=0)
    assert outcomes == {Lost, Ping}


def test_a_report_that_the_broker_refuses_is_told_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite edgeguard/v1/demo/camera-1/status\ntopic read edgeguard/v1/demo/#\n")
    broker = Mosquitto(tmp_path / "strict", more=f"acl_file {rules}\n")
    broker.start()
    link = make(broker.port, protocol="5")
    next_event(link, Connected)
    for _ in range(20):
        link.publish(topics.REPORT, b"a report")
    wait_until(lambda: "refused by the broker" in caplog.text, "the refusal")
    assert link.connected
    told = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert told == ["1 messages refused by the broker, the last one: 'report: Not authorized'"]
    link.close()
    broker.stop()


def test_no_more_reports_are_under_way_than_a_broker_of_mqtt_5_takes_at_once() -> None:
    heard: list[bytes] = []
    link = make(liar_5(connack=b"\x00\x00\x03\x21\x00\x02", heard=heard), protocol="5")
    next_event(link, Connected)
    for _ in range(5):
        link.publish(topics.REPORT, b"a report")
    wait_until(lambda: b"".join(heard).count(b"a report") == 2, "two reports")
    link.poll(0.2)
    assert b"".join(heard).count(b"a report") == 2
    link.close(wait_s=0)


def test_a_packet_larger_than_any_message_stays_with_a_broker_of_mqtt_5(mosquitto: Mosquitto, hub: TinyHub) -> None:
    link = make(mosquitto.port, protocol="5")
    next_event(link, Connected)
    hub.send("camera-1", "cmd/ping", bytes(4 * MAX_PAYLOAD))
    hub.send("camera-1", "cmd/ping", encode(Ping(id=ID)))
    assert next_event(link, Command) == Ping(id=ID)
    assert link._ignored._count == 0
    link.close()


class Waiting:
    """A spool's pending entries, as a plain list of positions."""

    def __init__(self, count: int) -> None:
        self.positions = list(range(1, count + 1))

    def __call__(self, after: int, limit: int) -> list[Entry]:
        found = [p for p in self.positions if p > after][:limit]
        return [Entry(p, BOOT, p, "report", b"") for p in found]

    def forget(self, *positions: int) -> frozenset[int]:
        self.positions = [p for p in self.positions if p not in positions]
        return frozenset(positions)


def sent(outflow: Outflow, waiting: Waiting, now_s: float) -> list[int]:
    return [entry.position for entry in outflow.take(waiting, now_s)]


def test_messages_go_out_in_order_and_no_more_than_the_window() -> None:
    outflow, waiting = Outflow(in_flight=3), Waiting(5)
    assert sent(outflow, waiting, 0) == [1, 2, 3]
    assert sent(outflow, waiting, 0) == []
    outflow.acknowledged(waiting.forget(1, 2), 0)
    assert sent(outflow, waiting, 0) == [4, 5]


def test_what_is_unacknowledged_is_sent_again_ever_more_rarely() -> None:
    outflow, waiting = Outflow(first_s=5, cap_s=15), Waiting(2)
    times = [t for t in range(100) if sent(outflow, waiting, float(t)) == [1, 2]]
    assert times == [0, 5, 15, 30, 45, 60, 75, 90]


def test_an_ack_brings_the_time_out_back_to_its_first_value() -> None:
    outflow, waiting = Outflow(first_s=5, cap_s=100), Waiting(2)
    for t in (0.0, 5.0, 15.0):
        assert sent(outflow, waiting, t) == [1, 2]
    outflow.acknowledged(waiting.forget(1), 20.0)
    assert sent(outflow, waiting, 24.9) == []
    assert sent(outflow, waiting, 25.0) == [2]


def test_an_ack_of_nothing_new_does_not_put_off_the_time_out() -> None:
    outflow, waiting = Outflow(first_s=5), Waiting(1)
    sent(outflow, waiting, 0)
    outflow.acknowledged(frozenset(), 4)
    assert sent(outflow, waiting, 5) == [1]


def test_a_new_connection_starts_from_the_oldest() -> None:
    outflow, waiting = Outflow(), Waiting(3)
    assert sent(outflow, waiting, 0) == [1, 2, 3]
    outflow.restart()
    assert sent(outflow, waiting, 0) == [1, 2, 3]


def test_a_gap_is_sent_again() -> None:
    outflow, waiting = Outflow(first_s=5), Waiting(3)
    sent(outflow, waiting, 0)
    outflow.acknowledged(waiting.forget(1, 3), 1)
    assert sent(outflow, waiting, 5.9) == []
    assert sent(outflow, waiting, 6) == [2]


def test_the_oldest_is_sent_again_in_time_while_later_ones_are_acknowledged() -> None:
    outflow, waiting = Outflow(first_s=5), Waiting(1)
    times = []
    for t in range(60):
        if 1 in sent(outflow, waiting, float(t)):
            times.append(t)
        # Every second another report, which the hub acknowledges at once.
        waiting.positions.append(t + 2)
        sent(outflow, waiting, float(t))
        outflow.acknowledged(waiting.forget(t + 2), float(t))
    assert times == list(range(0, 60, 5))


def test_what_the_hub_misses_is_sent_again_without_waiting_for_the_time_out() -> None:
    outflow, waiting = Outflow(first_s=3600), Waiting(3)
    sent(outflow, waiting, 0)
    outflow.acknowledged(waiting.forget(3), 10, gaps=frozenset({2}))
    assert sent(outflow, waiting, 10) == [2]


def test_what_the_hub_misses_is_sent_again_every_few_seconds_however_often_it_says_so() -> None:
    outflow, waiting = Outflow(first_s=3600), Waiting(2)
    times = []
    for t in range(10):
        if 1 in sent(outflow, waiting, float(t)):
            times.append(t)
        outflow.acknowledged(waiting.forget(2), float(t), gaps=frozenset({1}))
    assert times == [0, 3, 6, 9]


def test_a_gap_that_is_filled_meanwhile_or_dropped_is_neither_sent_nor_waited_for() -> None:
    outflow, waiting = Outflow(first_s=3600, in_flight=4), Waiting(4)
    sent(outflow, waiting, 0)
    outflow.acknowledged(waiting.forget(4), 1, gaps=frozenset({1, 2}))
    outflow.acknowledged(waiting.forget(1), 2)
    waiting.forget(2)
    assert sent(outflow, waiting, 10) == []
    waiting.positions += [5, 6, 7, 8]
    assert sent(outflow, waiting, 10) == [5, 6, 7]


def test_back_off_doubles_up_to_its_bound() -> None:
    assert [backoff(n, first_s=1, cap_s=10) for n in (0, 1, 2, 3, 4, 10_000)] == [1, 2, 4, 8, 10, 10]


def test_what_is_for_a_microcontroller_comes_with_its_name(hub: TinyHub, mosquitto: Mosquitto) -> None:
    link = Link(
        BrokerConfig(host="127.0.0.1", port=mosquitto.port), fleet="demo", device="gate", boot=BOOT,
        next_session=itertools.count(1).__next__, behind=("gate~pump",),
    )  # fmt: skip
    next_event(link, Connected)
    ack = Ack(boot=BOOT, through_seq=3)
    hub.send("gate~valve", topics.ACK, encode(ack))
    hub.send("gate~pump", topics.ACK, encode(ack))
    assert next_event(link, For) == For("gate~pump", ack)
    hub.send("gate~pump", "cmd/ping", encode(Ping(id=ID)))
    assert next_event(link, For) == For("gate~pump", Ping(id=ID))
    hub.hint("gate~pump", "m-2.tflite", 2)
    assert next_event(link, For) == For("gate~pump", Hint(Desired(target="m-2.tflite", sequence=2), fresh=True))
    hub.send("gate", topics.ACK, encode(ack))
    assert next_event(link, Ack) == ack
    link.publish(topics.STATUS, Status(state="online", session=9, boot=BOOT, via=1), device="gate~pump")
    wait_until(lambda: hub.latest(Status), "its status")
    link.close()
