"""Takes what devices publish, has it stored, and acknowledges it afterwards.

Rules enforced here:

* broker and device are acknowledged *after* the commit, never before; a transaction that fails is tried again with the
  same batch, and the broker's window of unacknowledged messages holds the rest back meanwhile;
* a batch never waits to fill up: brokers hold few unacknowledged messages (mosquitto 20), so waiting would starve it;
* a message that the database cannot take for what is in it becomes a dead letter, alone; for any other reason all wait;
* a device that brings more than it may costs the others nothing: what exceeds is acknowledged to the broker alone. A
  report is sent again, and told to be missing by the acknowledgements of those after it; other messages are lost;
* dead letters, lines in the log and events that one device can cause are limited, each on its own;
* one fixed client id and a session that the broker keeps: what arrives while the hub is away waits there;
* a subscription that several processes share is for reports and alerts alone: a broker repeats nothing retained on it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError, StatementError

from edgeguard import broker as brokers
from edgeguard.contract import topics
from edgeguard.contract.messages import Ack, Alert, Message, Report, encode
from edgeguard.hub import ingest
from edgeguard.hub.config import IngestConfig
from edgeguard.hub.ingest import Accepted, Acks, ModelShape, Rejected
from edgeguard.hub.limits import Limiter, Novelties
from edgeguard.hub.link import RECONNECT_FIRST_S, Arrivals, Down, Link, Order, State, Up
from edgeguard.hub.store import Store, reason
from edgeguard.settings import BrokerConfig, password

BATCH = 2048
"""Half of what brokers should send ahead: while one half is committed, the other is on its way."""
BATCH_BYTES = 8 << 20
STORE_RETRY_S = 1.0
SHARED: Collection[str] = (topics.REPORT, topics.ALERT)
"""Channels that a device repeats until it is acknowledged."""
RETAINED = tuple(channel for channel in topics.DEVICE_CHANNELS if channel not in SHARED)
"""The others: those that a broker repeats to each subscriber, and health, which may be lost."""
_USUAL = IngestConfig()
_RACES = 3
"""Processes that store for one device at once can each find that the other was first."""
_QUEUE = 64
_TICK_S = 0.2
_NEW_MODELS_AT_ONCE, _NEW_MODELS_PER_DAY = 16, 4
_NEW_BOOTS_AT_ONCE, _NEW_BOOTS_PER_DAY = 256, 480
_EVENT_EVERY_S = 600.0
_LETTERS_AT_ONCE = 50
_LINES_PER_SECOND, _LINES_AT_ONCE = 2.0, 100

log = logging.getLogger(__name__)


class Totals(msgspec.Struct, frozen=True):
    """What came since the start: messages taken, rejected, and beyond their device's limit.

    ``batches`` were committed; ``stored_s`` is what that took, ``lag_s`` the same from the arrival of the oldest
    message of each on.
    """

    taken: int = 0
    rejected: int = 0
    limited: int = 0
    batches: int = 0
    stored_s: float = 0.0
    lag_s: float = 0.0


class _Delivery(NamedTuple):
    """What the connection brought at once, read: its messages count ``size`` bytes, and ``mids`` are to be answered."""

    at_s: float
    connection: int
    items: list[Accepted | Rejected]
    replies: list[tuple[str, str, bytes]]
    mids: list[int]
    messages: int
    size: int


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
        limits: how much one device may bring, and how often it is acknowledged.
        channels: what to subscribe to; of the other channels the client's session is rid.
        group: the shared subscription that reports and alerts come from, None for one that nobody shares.
        replied: called from the worker's thread with device, command and payload of each reply; with it, the client
            subscribes to replies. What it raises is logged.
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
        limits: IngestConfig = _USUAL,
        channels: Collection[str] = topics.DEVICE_CHANNELS,
        group: str | None = None,
        replied: Callable[[str, str, bytes], None] | None = None,
    ) -> None:
        self._broker = broker
        self._fleet = fleet
        self._client_id = client_id
        self._store = store
        self._models = models
        self._clock_ms = clock_ms
        self._stored = stored
        self._replied = replied
        order = Order(
            broker=broker,
            client_id=client_id,
            secret=password(broker),
            subscribe=_filters(fleet, channels, group, replies=replied is not None),
            unsubscribe=_others(fleet, channels, group, replies=replied is not None),
        )
        self._link = Link(order)
        self._queue: queue.Queue[_Delivery] = queue.Queue(_QUEUE)
        self._acks = Acks(limits.ack_every_s)
        self._gate = _Gate(limits)
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._taken = self._rejected = self._limited = self._batches = 0
        self._stored_s = self._lag_s = 0.0
        self.connected = False
        self.connections = 0
        """How many connections were accepted so far: retained hints are published anew on each."""

    @property
    def totals(self) -> Totals:
        """What came so far."""
        return Totals(self._taken, self._rejected, self._limited, self._batches, self._stored_s, self._lag_s)

    @property
    def waiting(self) -> int:
        """Deliveries of the connection that are not stored yet, of a message or several each."""
        return self._queue.qsize()

    def start(self) -> None:
        """Connect in the background and begin to store.

        Raises:
            ConfigError: a certificate cannot be used.
        """
        brokers.check_files(self._broker)  # told now, not by the process that connects
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
            self._link.close()
        self._link.end(max(0.1, deadline - time.monotonic()))

    def publish(self, device: str, channel: str, message: Message, *, retain: bool = False) -> bool:
        """Hand a message for a device to the broker. Returns False where there is no connection."""
        if not self.connected:
            return False
        content = (topics.topic(self._fleet, device, channel), encode(message), retain)
        self._link.send(Down(0, [], [content]))
        return True

    def withdraw(self, device: str, channel: str) -> bool:
        """Have the broker forget what it retains for a device. Returns False where there is no connection."""
        if not self.connected:
            return False
        self._link.send(Down(0, [], [(topics.topic(self._fleet, device, channel), b"", True)]))
        return True

    # -- the connection's thread

    def _stay_connected(self) -> None:
        while not self._stopping.is_set():
            try:
                self._link.start()
                while (arrived := self._link.receive()) is not None:
                    for up in arrived:
                        self._hear(up)
            except (OSError, msgspec.MsgspecError) as error:
                log.error("the process of the connection: %s", error)  # noqa: TRY400
            self.connected = False
            if not self._stopping.is_set():
                self._link.close()
                self._link.end(1.0)
                log.warning("the process of the connection ended; starting it again")
                self._stopping.wait(RECONNECT_FIRST_S)

    def _hear(self, up: Up) -> None:
        where = f"broker {self._broker.host}:{self._broker.port}"
        if isinstance(up, Arrivals):
            # Read here: decoding goes on while the other thread waits for the database.
            delivery = self._read(up)
            while not self._stopping.is_set():
                with suppress(queue.Full):
                    self._queue.put(delivery, timeout=_TICK_S)
                    return
        elif isinstance(up, State):
            self.connected = up.connected
            if up.connected:
                self.connections += 1
                log.info("connected to %s", where)
            elif not self._stopping.is_set():
                log.warning("no connection to %s: %s; trying again", where, up.reason)
        else:
            log.error("%s: %s", where, up.text)

    # -- the worker's thread

    def _work(self) -> None:
        while not self._stopping.is_set():
            batch = self._take()
            if batch:
                self._handle(batch)
            self._send_acks(self._acks.take(time.monotonic()))
        self._send_acks(self._acks.take_all())

    def _take(self) -> list[_Delivery]:
        """What is there, waiting only for the first."""
        batch: list[_Delivery] = []
        messages = size = 0
        wait_s = min(_TICK_S, self._acks.due_in_s(time.monotonic()))
        with suppress(queue.Empty):
            while messages < BATCH and size < BATCH_BYTES:
                delivery = self._queue.get_nowait() if batch or not wait_s else self._queue.get(timeout=wait_s)
                batch.append(delivery)
                messages, size = messages + delivery.messages, size + delivery.size
        return batch

    def _handle(self, batch: Sequence[_Delivery]) -> None:
        for delivery in batch:
            for device, channel, payload in delivery.replies:
                self._hand_over(device, channel, payload)
        items = [item for delivery in batch for item in delivery.items]
        began_s = time.monotonic()
        acks = self._store_all(items) if items else []
        if acks is None:
            return
        done_s = time.monotonic()
        self._batches += 1
        self._stored_s += done_s - began_s
        self._lag_s += done_s - batch[0].at_s
        for connection in {delivery.connection for delivery in batch}:
            mids = [mid for delivery in batch if delivery.connection == connection for mid in delivery.mids]
            self._link.send(Down(connection, mids, []))
        self._acks.add(acks)
        self._write_events()
        if items:
            self._stored()

    def _read(self, arrived: Arrivals) -> _Delivery:
        """What of these is to be stored or handed over."""
        models, now_s = self._models(), time.monotonic()
        items: list[Accepted | Rejected] = []
        replies: list[tuple[str, str, bytes]] = []
        mids: list[int] = []
        size = 0
        for topic, payload, mid, qos, retained in arrived.messages:
            size += len(payload)
            if qos:
                mids.append(mid)
            device, channel = _parts(topic)
            if not self._gate.passes(device, channel, len(payload), now_s):
                self._limited += 1
            elif channel.startswith(f"{topics.REPLY}/") and self._replied is not None:
                replies.append((device, channel, payload))
            else:
                item = ingest.read(topic, payload, fleet=self._fleet, models=models, retained=retained)
                if isinstance(item, Rejected):
                    self._rejected += 1
                    if not self._gate.lists(device, now_s):
                        item = msgspec.structs.replace(item, listed=False)
                    elif self._gate.tells(now_s):
                        log.warning("message rejected: %s: %s", item.topic, item.reason)
                elif not self._gate.admits(item, now_s):
                    self._limited += 1
                    continue
                if isinstance(item, Accepted) or item.listed or item.identity is not None:
                    items.append(item)
        self._taken += sum(isinstance(item, Accepted) for item in items)
        return _Delivery(now_s, arrived.connection, items, replies, mids, len(arrived.messages), size)

    def _hand_over(self, device: str, channel: str, payload: bytes) -> None:
        assert self._replied is not None
        try:
            self._replied(topics.check_device(device), channel.partition("/")[2], payload)
        except Exception:
            # Of a device, or of the hub: either way the next message is none the worse for it.
            if self._gate.tells(time.monotonic()):
                log.exception("a reply of %r cannot be taken", device[:200])

    def _send_acks(self, acks: Sequence[tuple[str, Ack]]) -> None:
        if acks and self.connected:
            self._link.send(
                Down(0, [], [(topics.topic(self._fleet, name, topics.ACK), encode(ack), False) for name, ack in acks])
            )

    def _write_events(self) -> None:
        for device in self._gate.take_told():
            text = f"{device} sends more than it may: what exceeds waits with the device"
            log.warning("%s", text)
            try:
                self._store.add_event("rate_limited", device, text, at_ms=self._clock_ms())
            except SQLAlchemyError as error:
                log.warning("an event was not written: %s", reason(error))

    def _store_all(self, items: Sequence[Accepted | Rejected]) -> list[tuple[str, Ack]] | None:
        """Store a batch, however long it takes. None when the hub stops first: then nothing may be acknowledged."""
        races = 0
        while not self._stopping.is_set():
            try:
                return self._store.apply(items, now_ms=self._clock_ms())
            except (SQLAlchemyError, ValueError, TypeError, ArithmeticError) as error:
                if isinstance(error, IntegrityError) and races < _RACES:
                    races += 1
                elif not _of_content(error):
                    log.error("database: %s; trying again", reason(error))  # noqa: TRY400
                    self._stopping.wait(STORE_RETRY_S)
                elif len(items) == 1:
                    log.exception("a message cannot be stored")
                    items = [_unstorable(items[0], error)]
                else:
                    return self._store_singly(items)
        return None

    def _store_singly(self, items: Sequence[Accepted | Rejected]) -> list[tuple[str, Ack]] | None:
        acks: dict[tuple[str, str], tuple[str, Ack]] = {}
        for item in items:
            one = self._store_all([item])
            if one is None:
                return None
            acks.update({(device, ack.boot): (device, ack) for device, ack in one})
        return list(acks.values())


class _Gate:
    """What one device may bring: messages, dead letters, events."""

    def __init__(self, limits: IngestConfig) -> None:
        self._messages = Limiter(
            rate=limits.messages_per_second,
            burst=limits.burst_messages,
            bytes_rate=limits.kib_per_second * 1024,
            bytes_burst=limits.burst_mib * (1 << 20),
        )
        letters = limits.dead_letters_per_minute
        self._letters = Limiter(rate=letters / 60, burst=_LETTERS_AT_ONCE)
        self._lines = Limiter(rate=_LINES_PER_SECOND, burst=_LINES_AT_ONCE)
        self._events = Limiter(rate=1 / _EVENT_EVERY_S, burst=1)
        self._models = Novelties(rate=_NEW_MODELS_PER_DAY / 86_400, burst=_NEW_MODELS_AT_ONCE)
        self._boots = Novelties(rate=_NEW_BOOTS_PER_DAY / 86_400, burst=_NEW_BOOTS_AT_ONCE)
        self._told: list[str] = []

    def passes(self, device: str, channel: str, size: int, now_s: float) -> bool:
        """Whether a message of a device is looked at. Those that it repeats have a bucket of their own."""
        if self._messages.passes((device, channel in SHARED), now_s=now_s, size=size):
            return True
        if self._events.passes(device, now_s=now_s) and self.tells(now_s):
            self._told.append(device)
        return False

    def admits(self, item: Accepted, now_s: float) -> bool:
        """Whether a report or alert is of a model and a boot that its device may have: each new one costs rows."""
        message = item.message
        if not isinstance(message, Report | Alert):
            return True
        model = message.model_digest, message.guard_digest
        admitted = self._models.passes(item.device, model, now_s=now_s)
        if not (admitted and self._boots.passes(item.device, message.boot, now_s=now_s)):
            if self._events.passes(item.device, now_s=now_s) and self.tells(now_s):
                self._told.append(item.device)
            return False
        return True

    def lists(self, device: str, now_s: float) -> bool:
        """Whether another rejected message of a device is kept."""
        return self._letters.passes(device, now_s=now_s)

    def tells(self, now_s: float) -> bool:
        """Whether another line is written, whoever caused it."""
        return self._lines.passes("", now_s=now_s)

    def take_told(self) -> list[str]:
        """Devices to say of that they exceeded their limit."""
        # Filled by the connection's thread: only what is there now is taken out.
        told = self._told[:]
        del self._told[: len(told)]
        return told


def _filters(fleet: str, channels: Collection[str], group: str | None, *, replies: bool) -> tuple[tuple[str, int], ...]:
    """Topic filters and QoS. ``$share`` works in MQTT 5 (4.8.2), and in 3.1.1 where the broker knows it."""
    shared = f"$share/{group}/"
    wanted = [*channels, topics.reply("+")] if replies else [*channels]
    return tuple(
        (
            (shared if group and channel in SHARED else "") + topics.subscription(fleet, channel),
            0 if channel == topics.HEALTH else 1,
        )
        for channel in wanted
    )


def _others(fleet: str, channels: Collection[str], group: str | None, *, replies: bool) -> tuple[str, ...]:
    """Filters that this client's session may still have from a time when it was configured otherwise."""
    mine = {name for name, _ in _filters(fleet, channels, group, replies=replies)}
    possible = _filters(fleet, topics.DEVICE_CHANNELS, None, replies=True)
    return tuple(name for name, _ in possible if name not in mine)


def _parts(topic: str) -> tuple[str, str]:
    """Device and channel as the topic tells them, not checked; empty where it has too few parts."""
    parts = topic.split("/", 4)
    return (parts[3], parts[4]) if len(parts) == 5 else ("", "")


def _of_content(error: Exception) -> bool:
    """Whether what was to be stored is at fault, rather than the database."""
    return not isinstance(error, SQLAlchemyError) or (
        isinstance(error, DataError | IntegrityError) or type(error) is StatementError
    )


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
