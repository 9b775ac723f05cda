"""Twenty thousand hostile payloads: whatever arrives, the link gives a checked event or nothing, and lives."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgeguard.agent.link import Connected, Hint, Link, Lost
from edgeguard.contract.messages import COMMANDS, MAX_PAYLOAD, Ack, Command, Desired, Message, decode, encode
from edgeguard.errors import LinkError
from edgeguard.settings import BrokerConfig
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.tiny_hub import wait_until

BOOT = "00000000000000aa"
US = "edgeguard/v1/demo/camera-1/"
CHANNELS = ("ack", "model/desired", *(f"cmd/{name}" for name in COMMANDS))
OTHERS = ("cmd/shell", "cmd/", "cmd/ping/x", "cmd", "report", "reply/ping", "ack/x", "", "\u2028")
GOLDEN = {
    "ack": encode(Ack(boot=BOOT, through_seq=7, gaps=(3, 5))),
    "model/desired": encode(Desired(target="m-2.tflite", sequence=2)),
    **{
        f"cmd/{name}": (Path(__file__).parents[1] / "contract" / "golden" / f"{kind.__name__}.json").read_bytes()
        for name, kind in COMMANDS.items()
    },
}
TOKENS = (
    b"null", b"true", b"-1", b"0", b"1e308", b"1e999", b"-0", b"NaN", b"Infinity", b"9" * 400, b"1" * 5000,
    b"18446744073709551616", b"0.1", b'""', b'"\\ud800"', b'"\\u0000"', b'"\xff"', b"[]", b"{}", b"[" * 2000,
    b'{"v":' * 500, b'"' + b"x" * 5000 + b'"', b"\x00", b",", b'"a":1', b"\xef\xbb\xbf",
)  # fmt: skip


def hostile(numbers: random.Random) -> tuple[str, bytes]:
    """One channel and payload: mostly an honest one with something broken in it."""
    channel = numbers.choice(CHANNELS)
    payload = GOLDEN[channel]
    kind = numbers.randrange(10)
    if kind == 0:
        payload = numbers.randbytes(numbers.randrange(200))
    elif kind == 1:
        payload = GOLDEN[numbers.choice(CHANNELS)]
    elif kind == 2:
        payload = numbers.choice((b"[", b'{"a":', b'[{"v":', b'{"id":[')) * numbers.choice((10, 500, 50_000))
    elif kind == 3:
        channel = numbers.choice(OTHERS)
    elif kind in (4, 5):
        fields = json.loads(payload)
        fields[numbers.choice([*fields, "new"])] = "?"
        payload = json.dumps(fields).encode().replace(b'"?"', numbers.choice(TOKENS))
    elif kind == 6:
        payload = payload[: numbers.randrange(len(payload))] + numbers.choice(TOKENS)
    elif kind == 7 and not numbers.randrange(20):
        payload = payload.ljust(MAX_PAYLOAD + numbers.randrange(3))
    else:
        damaged = bytearray(payload)
        for _ in range(numbers.randint(1, 3)):
            damaged[numbers.randrange(len(damaged))] = numbers.randrange(256)
        payload = bytes(damaged)
    return channel, payload


def link_to(port: int) -> Link:
    counter = itertools.count(1)
    return Link(
        BrokerConfig(host="127.0.0.1", port=port),
        fleet="demo",
        device="camera-1",
        boot=BOOT,
        next_session=lambda: next(counter),
    )


def received(topic: bytes, payload: bytes, *, retained: bool, duplicate: bool) -> mqtt.MQTTMessage:
    """What paho hands over."""
    message = mqtt.MQTTMessage(topic=topic)
    message.payload, message.retain, message.dup, message.qos = payload, retained, duplicate, 1
    return message


def test_20000_hostile_payloads_give_a_checked_event_or_nothing() -> None:
    link = link_to(1)
    numbers = random.Random(20_000)
    outcomes: Counter[str] = Counter()
    for _ in range(20_000):
        channel, payload = hostile(numbers)
        topic = (US + channel).encode() if numbers.randrange(50) else numbers.randbytes(30)
        retained = not numbers.randrange(10)
        event = link._decode(received(topic, payload, retained=retained, duplicate=bool(numbers.randrange(2))))
        outcomes[type(event).__name__] += 1
        assert event is None or isinstance(event, Ack | Hint | Command)
        assert not (isinstance(event, Command) and retained)
        message = event.desired if isinstance(event, Hint) else event
        if message is not None:
            assert isinstance(message, Message)
            assert decode(type(message), encode(message)) == message
    assert set(outcomes) == {"NoneType", "Ack", "Hint", *(kind.__name__ for kind in COMMANDS.values())}
    assert outcomes["NoneType"] > 10_000


def test_what_is_refused_is_refused_by_a_rule_and_not_by_accident() -> None:
    link = link_to(1)
    numbers = random.Random(5000)
    for _ in range(5000):
        channel, payload = hostile(numbers)
        with suppress(LinkError):
            link._read(US + channel, payload, retained=False)


@pytest.fixture
def attacker(mosquitto: Mosquitto) -> Iterator[mqtt.Client]:
    """Somebody who may publish anything."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="attacker")
    client.max_queued_messages_set(0)
    client.connect("127.0.0.1", mosquitto.port)
    client.loop_start()
    yield client
    client.disconnect()
    client.loop_stop()


def test_2000_hostile_payloads_through_a_broker_leave_the_link_up(mosquitto: Mosquitto, attacker: mqtt.Client) -> None:
    link = link_to(mosquitto.port)
    wait_until(lambda: any(isinstance(event, Connected) for event in link.poll(0.05)), "a connection")
    numbers = random.Random(2000)
    events: list[object] = []
    for _ in range(2000):
        channel, payload = hostile(numbers)
        attacker.publish(US + channel, payload, qos=1, retain=not numbers.randrange(10))
        events += link.poll()
    good = Ack(boot=BOOT, through_seq=2**53)
    attacker.publish(US + "ack", encode(good), qos=1)

    def came() -> bool:
        events.extend(link.poll(0.05))
        return good in events

    wait_until(came, "the ack that follows")
    assert not [event for event in events if isinstance(event, Lost)]
    assert link.connected and link.session == 1
    assert {type(event) for event in events} == {Ack, Hint, *COMMANDS.values()}
    link.close()
