"""Sealed submissions over MQTT: published retained by devices, heard by each party.

Retained, so that a party may come later than the devices; what a broker, or whoever else listens, sees of them is who
takes part in which round, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import paho.mqtt.client as mqtt

from edgeguard import broker as brokers
from edgeguard.contract import topics
from edgeguard.contract.private import Submission
from edgeguard.errors import LinkError
from edgeguard.settings import BrokerConfig, password

ANSWER_S = 10.0
_TICK_S = 0.2


def publish(broker: BrokerConfig, fleet: str, submission: Submission) -> None:
    """Publish a device's submission, and wait until the broker has it.

    A broker that knows clients by their identity ends another connection of this device's for a moment.

    Raises:
        LinkError: the broker does not answer.
    """
    client = _connected(broker)
    client.loop_start()
    try:
        topic = topics.topic(fleet, submission.device, topics.PRIVATE)
        sent = client.publish(topic, msgspec.json.encode(submission), qos=1, retain=True)
        sent.wait_for_publish(ANSWER_S)
        if not sent.is_published():
            raise _unreached(broker, f"no acknowledgement within {ANSWER_S:g} s")
    except (RuntimeError, ValueError) as error:
        raise _unreached(broker, error) from error
    finally:
        client.disconnect()
        client.loop_stop()


def listen(
    broker: BrokerConfig, fleet: str, take: Callable[[str, bytes], object], done: Callable[[], bool], wait_s: float
) -> None:
    """Hear the submissions of a fleet until it is enough, or the time is up.

    Args:
        broker: where devices publish.
        fleet: id of the fleet.
        take: called with device and payload, in this thread.
        done: asked after each.
        wait_s: seconds to wait at most.

    Raises:
        LinkError: the broker does not answer, or refuses the subscription.
    """
    client = _connected(broker)
    failures: list[str] = []

    def on_subscribe(_c: mqtt.Client, _u: Any, _m: int, codes: list[Any], _p: Any) -> None:
        failures.extend(str(code) for code in codes if code.is_failure)

    def on_message(_c: mqtt.Client, _u: Any, message: mqtt.MQTTMessage) -> None:
        try:
            address = topics.parse(message.topic)
        except LinkError:
            return
        take(address.device, bytes(message.payload))

    client.on_subscribe, client.on_message = on_subscribe, on_message
    client.subscribe(topics.subscription(fleet, topics.PRIVATE), qos=1)
    deadline = time.monotonic() + wait_s
    try:
        while not failures and not done() and time.monotonic() < deadline:
            code = client.loop(timeout=_TICK_S)
            if code != mqtt.MQTT_ERR_SUCCESS:
                failures.append(mqtt.error_string(code))
    finally:
        client.disconnect()
    if failures:
        raise LinkError(f"broker {broker.host}:{broker.port}", got=failures[0], do="start it, or check this account")


def _unreached(broker: BrokerConfig, got: object) -> LinkError:
    return LinkError(f"broker {broker.host}:{broker.port}", got=got, do="give the same command again")


def _connected(broker: BrokerConfig) -> mqtt.Client:
    client = brokers.client(broker, "", password(broker), clean_session=True)
    answer: list[str] = []
    client.on_connect = lambda _c, _u, _f, code, _p: answer.append(f"refused: {code}" if code.is_failure else "")
    deadline = time.monotonic() + ANSWER_S
    try:
        brokers.connect(client, broker, clean_session=True)
        while not answer and time.monotonic() < deadline:
            client.loop(timeout=_TICK_S)
    except (OSError, ValueError) as error:
        answer.append(brokers.reason(error))
    if not answer or answer[0]:
        got = answer[0] if answer else f"no answer within {ANSWER_S:g} s"
        raise LinkError(f"broker {broker.host}:{broker.port}", got=got, do="start it, or correct [broker]")
    return client
