"""The hub's MQTT connection: takes what devices publish, has it stored, and acknowledges it afterwards.

Rules enforced here:

* paho's thread only hands raw messages over; a worker decodes, stores and acknowledges them in batches;
* broker and device are acknowledged *after* the commit, never before; a transaction that fails is tried again with the
  same batch, and the broker's window of unacknowledged messages holds the rest back meanwhile;
* a batch never waits to fill up: brokers hold few unacknowledged messages (mosquitto 20), so waiting would starve it;
* a message that makes storing fail for any other reason than the database's own state becomes a dead letter, alone;
* MQTT 3.1.1, one fixed client id, a persistent session: what arrives while the hub is away waits at the broker;
* the broker may come, go and lie at any time: every end of a connection leads to one log line and another attempt.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from edgeguard import broker as brokers
from edgeguard.contract import topics
from edgeguard.contract.messages import Ack, Alert, Message, Report, encode
from edgeguard.hub import ingest
from edgeguard.hub.ingest import Accepted, ModelShape, Rejected
from edgeguard.hub.store import Store
from edgeguard.settings import BrokerConfig, password

BATCH = 256
RECONNECT_FIRST_S = 0.5
RECONNECT_CAP_S = 10.0
STORE_RETRY_S = 1.0
_QUEUE = 1024
_OUTGOING = 20_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Raw:
    client: mqtt.Client
    topic: str
    payload: bytes
    mid: int
    qos: int
    retained: bool


class Listener:
    """Keeps the hub connected, and stores what comes.

    Args:
        broker: where to connect.
        fleet: the fleet to listen to.
        client_id: the hub's fixed client id.
        store: where to.
        models: gives what is known of models now, by model digest.
        clock_ms: the hub's clock.
        stored: called after each commit, from the worker's thread.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        *,
        fleet: str,
        client_id: str,
        store: Store,
        models: Callable[[], Mapping[str, ModelShape]],
        clock_ms: Callable[[], int],
        stored: Callable[[], None] = lambda: None,
    ) -> None:
        self._broker = broker
        self._fleet = fleet
        self._client_id = client_id
        self._store = store
        self._models = models
        self._clock_ms = clock_ms
        self._stored = stored
        self._password = password(broker)
        self._queue: queue.Queue[_Raw] = queue.Queue(_QUEUE)
        self._stopping = threading.Event()
        self._client: mqtt.Client | None = None
        self._threads: list[threading.Thread] = []
        self.connected = False
        self.connections = 0
        """How many connections were accepted so far: retained hints are published anew on each."""

    def start(self) -> None:
        """Connect in the background and begin to store."""
        _client(self._broker, self._client_id, self._password)  # a bad certificate is told now, not in a thread
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("store", self._work), ("mqtt", self._stay_connected))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, *, wait_s: float = 3.0) -> None:
        """Finish the batch at hand and disconnect. What is still queued stays with the broker."""
        self._stopping.set()
        deadline = time.monotonic() + wait_s
        for thread in self._threads:  # the worker first: its acks go out before the connection ends
            thread.join(max(0.1, deadline - time.monotonic()) / 2)
            if self._client is not None:
                self._client.disconnect()

    def publish(self, device: str, channel: str, message: Message, *, retain: bool = False) -> bool:
        """Hand a message for a device to the broker. Returns False where there is no connection."""
        client = self._client
        if client is None or not self.connected:
            return False
        info = client.publish(topics.topic(self._fleet, device, channel), encode(message), qos=1, retain=retain)
        return info.rc == mqtt.MQTT_ERR_SUCCESS

    def _stay_connected(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            before = self.connections
            reason = self._connect_once()
            self.connected = False
            if self._stopping.is_set():
                return
            failures = 0 if self.connections > before else failures + 1
            log.warning("no connection to broker %s:%d: %s; trying again", self._broker.host, self._broker.port, reason)
            self._stopping.wait(min(RECONNECT_CAP_S, RECONNECT_FIRST_S * 2.0 ** min(failures, 10)))

    def _connect_once(self) -> str:
        """One connection from beginning to end. Returns why it ended."""
        client = _client(self._broker, self._client_id, self._password, clean_session=False)
        client.manual_ack_set(True)
        client.max_queued_messages_set(_OUTGOING)
        reasons = ["the connection ended"]

        def on_connect(_c: mqtt.Client, _u: Any, _f: Any, reason: Any, _p: Any) -> None:
            if reason.is_failure:
                reasons.append(f"refused: {reason}")
                return
            log.info("connected to broker %s:%d", self._broker.host, self._broker.port)
            client.subscribe(
                [
                    (topics.subscription(self._fleet, channel), 0 if channel == topics.HEALTH else 1)
                    for channel in topics.DEVICE_CHANNELS
                ]
            )
            self.connections += 1
            self.connected = True

        def on_subscribe(_c: mqtt.Client, _u: Any, _m: int, granted: Sequence[Any], _p: Any) -> None:
            if any(code.is_failure for code in granted):
                log.error("the broker refuses a subscription of fleet %s: check its access rules", self._fleet)

        def on_disconnect(_c: mqtt.Client, _u: Any, _f: Any, reason: Any, _p: Any) -> None:
            self.connected = False
            reasons.append(str(reason))

        def on_message(_c: mqtt.Client, _u: Any, message: mqtt.MQTTMessage) -> None:
            try:
                topic = message.topic
            except UnicodeDecodeError:
                topic = "not UTF-8"
            raw = _Raw(client, topic, bytes(message.payload), message.mid, message.qos, message.retain)
            while not self._stopping.is_set():
                with suppress(queue.Full):
                    self._queue.put(raw, timeout=0.2)
                    return

        client.on_connect, client.on_disconnect = on_connect, on_disconnect
        client.on_subscribe, client.on_message = on_subscribe, on_message
        self._client = client
        try:
            client.connect(self._broker.host, self._broker.port, self._broker.keepalive_s)
            # Not loop_forever: only loop() is woken by what other threads publish, instead of after a second.
            while client.loop() == mqtt.MQTT_ERR_SUCCESS:
                pass
        except Exception as error:
            # Whatever a broker sends, or paho makes of it, must end as one lost connection.
            reasons.append(brokers.reason(error))
        return reasons[-1]

    def _work(self) -> None:
        while not self._stopping.is_set():
            batch = self._take()
            if batch:
                self._handle(batch)

    def _take(self) -> list[_Raw]:
        """What is there, waiting only for the first."""
        batch: list[_Raw] = []
        with suppress(queue.Empty):
            batch.append(self._queue.get(timeout=0.2))
            while len(batch) < BATCH:
                batch.append(self._queue.get_nowait())
        return batch

    def _handle(self, batch: Sequence[_Raw]) -> None:
        models = self._models()
        items = [
            ingest.read(raw.topic, raw.payload, fleet=self._fleet, models=models, retained=raw.retained)
            for raw in batch
        ]
        for item in items:
            if isinstance(item, Rejected):
                log.warning("message rejected: %s: %s", item.topic, item.reason)
        acks = self._store_all(items)
        if acks is None:
            return
        for raw in batch:
            # The client that it came from: on a newer connection its number may mean another message.
            raw.client.ack(raw.mid, raw.qos)
        for device, ack in acks:
            self.publish(device, topics.ACK, ack)
        self._stored()

    def _store_all(self, items: Sequence[Accepted | Rejected]) -> list[tuple[str, Ack]] | None:
        """Store a batch, however long it takes. None when the hub stops first: then nothing may be acknowledged."""
        while not self._stopping.is_set():
            try:
                return self._store.apply(items, now_ms=self._clock_ms())
            except (OperationalError, InterfaceError, PoolTimeoutError) as error:
                log.error("database: %s; trying again", error.args[0] if error.args else error)  # noqa: TRY400
                self._stopping.wait(STORE_RETRY_S)
            except (SQLAlchemyError, ValueError, TypeError, ArithmeticError) as error:
                if len(items) == 1:
                    log.exception("a message cannot be stored")
                    items = [_unstorable(items[0], error)]
                    continue
                acks: dict[tuple[str, str], tuple[str, Ack]] = {}
                for item in items:
                    one = self._store_all([item])
                    if one is None:
                        return None
                    acks.update({(device, ack.boot): (device, ack) for device, ack in one})
                return list(acks.values())
        return None


def _unstorable(item: Accepted | Rejected, error: Exception) -> Rejected:
    reason = f"cannot be stored: {type(error).__name__}"
    if isinstance(item, Rejected):
        # Not even its dead letter could be written: keep the bare fact.
        return Rejected(topic="unknown", reason=reason, head=b"", identity=item.identity)
    message = item.message
    return Rejected(
        topic=f"{item.device}/{type(message).__name__.lower()}",
        reason=reason,
        head=item.payload[:256],
        identity=(item.device, message.boot, message.seq) if isinstance(message, Report | Alert) else None,
    )


def _client(broker: BrokerConfig, client_id: str, secret: str | None, *, clean_session: bool = True) -> mqtt.Client:
    client = mqtt.Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        clean_session=clean_session,
        protocol=mqtt.MQTTv311,
        reconnect_on_failure=False,
    )
    # Without this, paho writes to the socket in the thread that publishes while its loop writes in another.
    client.on_socket_register_write = lambda _client, _userdata, _socket: None
    brokers.prepare(client, broker, secret)
    return client
