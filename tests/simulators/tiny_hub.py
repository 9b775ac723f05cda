"""The hub's side of the wire and no more: it stores each report once and acknowledges it, or is told not to."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgeguard.contract import topics
from edgeguard.contract.messages import (
    Ack,
    Alert,
    Birth,
    Desired,
    Health,
    Message,
    Report,
    Reported,
    Status,
    decode,
    encode,
)

M = TypeVar("M", bound=Message)

_KINDS: dict[str, type[Message]] = {
    topics.STATUS: Status,
    topics.BIRTH: Birth,
    topics.HEALTH: Health,
    topics.REPORT: Report,
    topics.ALERT: Alert,
    topics.MODEL_REPORTED: Reported,
}


def wait_until(condition: Callable[[], object], what: str, *, timeout_s: float = 30.0) -> None:
    """Return once ``condition`` holds; fail the test, saying what was waited for, after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {timeout_s} s")
        time.sleep(0.02)


class TinyHub:
    """One subscriber to a fleet. ``acking`` switches the acks; ``heard`` counts deliveries, ``stored`` each once.

    The first delivery of each seq in ``losing`` is lost.
    """

    def __init__(self, port: int, *, fleet: str = "demo", acking: bool = True) -> None:
        self.port = port
        self.acking = acking
        self.losing: set[int] = set()
        self.stored: dict[tuple[str, int], Report | Alert] = {}
        self.heard: Counter[tuple[str, int]] = Counter()
        self.said: list[Message] = []
        """Everything else, in the order of arrival."""
        self.replies: list[bytes] = []
        """Replies to commands, as they came."""
        self._fleet = fleet
        self._ready = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="tiny-hub", clean_session=False)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = lambda client, *_: client.subscribe(f"{topics.PREFIX}/{fleet}/#", qos=1)
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._ready.wait(10)

    def reports(self) -> list[Report]:
        """The reports stored, each once."""
        return [message for message in self.stored.values() if isinstance(message, Report)]

    def inputs(self) -> int:
        """Inputs counted by the stored reports."""
        return sum(report.inputs for report in self.reports())

    def wait_for(self, kind: type[Message], count: int) -> None:
        """Return once so many messages of a kind have come."""
        wait_until(lambda: len(self.all(kind)) >= count, f"{kind.__name__} number {count}")

    def latest(self, kind: type[M]) -> M | None:
        """The last message of a kind."""
        found = self.all(kind)
        return found[-1] if found else None

    def all(self, kind: type[M]) -> list[M]:
        """All messages of a kind, in the order of arrival."""
        return [message for message in self.said if isinstance(message, kind)]

    def hint(self, device: str, target: str, sequence: int) -> None:
        """Publish a retained hint."""
        self.send(device, topics.MODEL_DESIRED, encode(Desired(target=target, sequence=sequence)), retain=True)

    def send(self, device: str, channel: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish anything to a device."""
        info = self._client.publish(topics.topic(self._fleet, device, channel), payload, qos=1, retain=retain)
        info.wait_for_publish(10)

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, client: mqtt.Client, _userdata: object, message: mqtt.MQTTMessage) -> None:
        address = topics.parse(message.topic)
        if address.channel.startswith("reply/"):
            self.replies.append(bytes(message.payload))
        if address.channel not in _KINDS or not message.payload:
            return
        decoded = decode(_KINDS[address.channel], bytes(message.payload))
        if not isinstance(decoded, Report | Alert):
            self.said.append(decoded)
            return
        if decoded.seq in self.losing:
            self.losing.remove(decoded.seq)
            return
        self.stored[decoded.boot, decoded.seq] = decoded
        self.heard[decoded.boot, decoded.seq] += 1
        if self.acking:
            seqs = {seq for boot, seq in self.stored if boot == decoded.boot}
            gaps = tuple(sorted(set(range(1, max(seqs))) - seqs))
            ack = Ack(boot=decoded.boot, through_seq=max(seqs), gaps=gaps[:256])
            client.publish(topics.topic(self._fleet, address.device, topics.ACK), encode(ack), qos=1)
