"""Inputs from an MQTT topic: each message one input, an image (JPEG, PNG) or one frame of an array.

Rules enforced here:

* at most ``WAITING`` messages wait; beyond that the oldest are dropped and counted: a broker knows no back-pressure
  that would not take the connection down;
* payloads are hostile: what is larger than a frame may be, or does not decode, is dropped and counted;
* a broker that is away is tried again for ever, in a thread of its own.
"""

from __future__ import annotations

import logging
import selectors
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import paho.mqtt.client as mqtt

from edgeguard import broker as brokers
from edgeguard.agent.sources.base import Answer, Item, Refused, array_of, most_bytes
from edgeguard.agent.sources.handover import Handover
from edgeguard.contract import frames
from edgeguard.contract.guard import ModelInput
from edgeguard.detection import images
from edgeguard.errors import EdgeGuardError, LinkError
from edgeguard.settings import BrokerConfig, password

NAME = "mqtt"
WAITING = 16

log = logging.getLogger(__name__)


class TopicSource:
    """One subscription.

    Args:
        broker: where to subscribe.
        topic: the topic or filter.
        client_id: must differ from the agent's own.
        expected: what the model takes.

    Raises:
        ConfigError: the password file or the authority's certificate cannot be read.
    """

    name = NAME

    def __init__(self, broker: BrokerConfig, topic: str, *, client_id: str, expected: ModelInput) -> None:
        self._broker = broker
        self._topic = topic
        self._expected = expected
        self._handover: Handover[bytes] = Handover(WAITING)
        self._count = self._bad = 0
        self._selector: selectors.BaseSelector | None = None
        self.ended = False
        self._client = brokers.client(broker, client_id, password(broker), clean_session=True, reconnects=True)
        self._client.on_connect = self._connected
        self._client.on_subscribe = self._subscribed
        self._client.on_message = self._arrived

    @property
    def dropped(self) -> int:
        """Messages that were overtaken or are no inputs."""
        return self._bad + self._handover.dropped

    def open(self, selector: selectors.BaseSelector) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        self._selector = selector
        selector.register(self._handover.descriptor, selectors.EVENT_READ, self)
        brokers.connect(self._client, self._broker, clean_session=True, later=True)
        self._client.loop_start()

    def ready(self, key: selectors.SelectorKey, mask: int) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        self._handover.drain()

    def take(self) -> Item | Refused | None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        payload = self._handover.take()
        if payload is None:
            return None
        self._count += 1
        try:
            name, x = decode(payload, self._expected)
        except EdgeGuardError as error:
            self._bad += 1
            if self._bad & (self._bad - 1) == 0:  # told at the first, second, fourth, eighth ...
                log.warning("%s: message dropped (%d so far): %s", self._topic, self.dropped, error)
            return Refused.NO_INPUT
        return Item(source=NAME, name=name or str(self._count), inputs=x[np.newaxis])

    def answer(self, answer: Answer) -> None:
        """Nobody waits: results stand in ``[results]``."""

    def counted(self, names: Iterable[str]) -> None:
        """Nothing to let go of."""

    def close(self) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        self._client.disconnect()
        self._client.loop_stop()
        if self._selector is not None:
            self._selector.unregister(self._handover.descriptor)
        self._handover.close()

    def _connected(self, client: mqtt.Client, _u: Any, _f: Any, reason: Any, _p: Any) -> None:
        if reason.is_failure:
            log.warning("%s: the broker refuses: %s", self._topic, reason)
        else:
            client.subscribe(self._topic, qos=1)

    def _arrived(self, _c: mqtt.Client, _u: Any, message: mqtt.MQTTMessage) -> None:
        if len(message.payload) <= most_bytes(self._expected) + frames.MAX_HEADER:
            self._handover.put(bytes(message.payload), wait=False)
        else:
            self._bad += 1

    def _subscribed(self, _c: mqtt.Client, _u: Any, _m: int, reasons: Any, _p: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            log.warning("%s: the broker does not let this device subscribe", self._topic)


def decode(payload: bytes, expected: ModelInput) -> tuple[str, npt.NDArray[Any]]:
    """The name, which may be empty, and the input ``[*shape]`` in one message.

    Raises:
        ModelError: not an input of the model.
        LinkError: neither an image nor one whole frame.
    """
    if images.is_image(payload):
        return "", images.decode(payload, expected)
    found = frames.Reader().feed(payload)
    if len(found) != 1 or not isinstance(found[0][0], frames.Input):
        raise LinkError("message", got=f"{len(payload)} bytes", expected="a JPEG, a PNG or one input frame")
    frame, body = found[0]
    assert isinstance(frame, frames.Input)
    return frame.id, array_of(frame, body, expected)
