"""The MQTT connection of a device and of the microcontrollers behind it, and when to send which spooled message.

Rules enforced here:

* the agent's main thread never waits for the network: a thread hands over events that ``poll`` takes;
* every connection attempt has a session number of its own, in its will, its status and its birth, so that a
  late will never beats a newer birth;
* a broker's PUBACK proves nothing end to end: what the *hub* has not acknowledged is sent again, after a time
  that doubles up to a bound, and after every reconnect; what it says it misses is sent again soon, whatever
  else it acknowledges meanwhile;
* payloads from the broker are hostile: whatever one is made of costs that one message, never the connection or
  memory without bound. What is ignored is counted in one line a minute;
* a message that the broker refuses, as MQTT 5 lets it say, is told in the log and stays where it is: in the spool;
* what is for a microcontroller comes with its name, and is never taken for this device's own. Where a broker does not
  let this device speak for one, that one is not heard, and the others are;
* a command that is retained is ignored: it was sent to whoever comes, whenever. The DUP flag means nothing: MQTT does
  not promise that an earlier copy arrived; what executes a command knows its transaction id.
"""

from __future__ import annotations

import logging
import queue
import random
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import paho.mqtt.client as mqtt
from paho.mqtt.enums import MQTTErrorCode

from edgeguard import broker as brokers
from edgeguard.agent.spool import Entry
from edgeguard.contract import topics
from edgeguard.contract.messages import (
    COMMANDS,
    MAX_COMMAND,
    MAX_PAYLOAD,
    Ack,
    Command,
    Desired,
    Message,
    Status,
    decode,
    encode,
)
from edgeguard.errors import ConfigError, LinkError
from edgeguard.settings import BrokerConfig, password

IN_FLIGHT = 64
RESEND_FIRST_S = 5.0
RESEND_CAP = 12
"""The time-out grows up to this many times the first one."""
GAP_S = 3.0
"""A message that the hub misses is sent again at most this often."""
RECONNECT_FIRST_S = 0.5
RECONNECT_CAP_S = 30.0
MAX_WAITING = 1024
"""Messages that wait for ``poll``; what comes on top is ignored, for the hub says all but a hint again."""
TOLD_EVERY_S = 60.0

_MAX_PACKET = MAX_PAYLOAD + (128 << 10)
"""Of a larger packet the rest is dropped; MQTT's longest topic and a payload that is refused by its size remain."""
_CHUNK = 64 << 10
_HEARD = (topics.ACK, topics.MODEL_DESIRED, topics.command("+"))
"""Channels that the hub writes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Connected:
    """This session is up and subscribed; what is retained must be published anew."""

    session: int


@dataclass(frozen=True)
class Lost:
    """The connection is gone or was not made; a new attempt follows by itself."""

    reason: str


@dataclass(frozen=True)
class Hint:
    """A model waits, or, with None, none any more. ``fresh``: sent now, not the retained one repeated by the broker."""

    desired: Desired | None
    fresh: bool


Heard = Ack | Hint | Command
"""What the hub says to a device."""


@dataclass(frozen=True)
class For:
    """The hub says something to a microcontroller behind this device."""

    device: str
    event: Heard


Event = Connected | Lost | Heard | For


class Link:
    """Keeps one device connected to its broker.

    Args:
        broker: where to connect.
        fleet: id of the fleet.
        device: id of the device.
        behind: ids of the microcontrollers that it speaks for.
        boot: id of this process, 16 hex digits.
        next_session: gives the number of the next connection attempt.

    Raises:
        ConfigError: the password file cannot be read.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        *,
        fleet: str,
        device: str,
        boot: str,
        next_session: Callable[[], int],
        behind: Sequence[str] = (),
    ) -> None:
        self._broker = broker
        self._device = device
        self._devices = (device, *behind)
        self._boot = boot
        self._next_session = next_session
        self._client_id = f"edgeguard-{fleet}-{device}"
        channels = (*topics.DEVICE_CHANNELS, *(topics.reply(name) for name in COMMANDS))
        self._topic = {
            (name, channel): topics.topic(fleet, name, channel)
            for name in self._devices
            for channel in (*channels, *_HEARD)
        }
        commands = {topics.command(name): kind for name, kind in COMMANDS.items()}
        self._channel = {
            topics.topic(fleet, name, channel): (name, kind)
            for name in self._devices
            for channel, kind in {topics.ACK: Ack, topics.MODEL_DESIRED: Desired, **commands}.items()
        }
        self._password = password(broker)
        self._inbox: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._client: mqtt.Client | None = None
        self._attempt_at = time.monotonic()
        self._failures = 0
        self._ignored = _Tally("%d messages from the broker ignored, the last one: %r")
        self._refused = _Tally("%d messages refused by the broker, the last one: %r")
        self._under_way: dict[int, str] = {}
        """Channels of this connection's messages that the broker has not answered, by their number."""
        self.session = 0
        self.connected = False

    def poll(self, wait_s: float = 0.0) -> list[Event]:
        """Drive the connection and take what happened, waiting at most ``wait_s`` for something to happen."""
        now = time.monotonic()
        if self._client is None and now >= self._attempt_at:
            self._connect(now)
        elif self._client is not None and not self.connected and now - self._attempt_at > brokers.CONNECT_TIMEOUT_S:
            self._inbox.put((self.session, Lost(f"no answer within {brokers.CONNECT_TIMEOUT_S:g} s")))
        events: list[Event] = []
        try:
            item = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                events += self._accept(*item)
                item = self._inbox.get_nowait()
        except queue.Empty:
            return events

    def publish(
        self,
        channel: str,
        payload: Message | bytes,
        *,
        device: str | None = None,
        qos: int = 1,
        retain: bool = False,
    ) -> None:
        """Hand a message of this device, or of one behind it, to the broker; dropped where there is no connection."""
        if self._client is not None and self.connected:
            content = encode(payload) if isinstance(payload, Message) else payload
            topic = self._topic[device or self._device, channel]
            info = self._client.publish(topic, content, qos=qos, retain=retain)
            self._under_way[info.mid] = channel if device is None else f"{channel} of {device}"

    def send(self, topic: str, payload: bytes) -> None:
        """Publish to any topic, once at most; it is dropped where there is no connection."""
        if self._client is not None and self.connected:
            self._client.publish(topic, payload, qos=0)

    def close(self, *, wait_s: float = 2.0) -> None:
        """Say that the device stopped, and disconnect without firing the will; waits at most ``wait_s``."""
        client, self._client = self._client, None
        if client is None:
            return
        if self.connected:
            self.connected = False
            status = Status(state="stopped", session=self.session, boot=self._boot)
            info = client.publish(self._topic[self._device, topics.STATUS], encode(status), qos=1, retain=True)
            with suppress(RuntimeError, ValueError):
                info.wait_for_publish(wait_s)
            client.disconnect()
            deadline = time.monotonic() + wait_s
            while client.socket() is not None and time.monotonic() < deadline:
                time.sleep(0.01)
        _abandon(client)

    def _connect(self, now: float) -> None:
        self.session = session = self._next_session()
        will = Status(state="offline", session=session, boot=self._boot)
        try:
            client = brokers.client(
                self._broker,
                self._client_id,
                self._password,
                clean_session=True,
                kind=partial(_Client, ended=lambda reason: self._inbox.put((session, Lost(reason)))),
            )
        except ConfigError as error:
            # The files were good when the agent started: somebody is replacing them.
            self._try_later(str(error))
            return
        client.max_inflight_messages_set(IN_FLIGHT)
        client.will_set(self._topic[self._device, topics.STATUS], encode(will), qos=1, retain=True)

        def on_connect(_c: mqtt.Client, _u: Any, _f: Any, reason: Any, properties: Any) -> None:
            # paho gives the codes of MQTT 3.1.1 in the terms of version 5.
            if reason.is_failure:
                self._inbox.put((session, Lost(f"refused: {reason}")))
            elif self._client is not client:
                client.disconnect()  # it took so long that another attempt was begun
            else:
                brokers.keep_to_limits(client, properties)
                client.subscribe([(self._topic[name, channel], 1) for name in self._devices for channel in _HEARD])

        def on_subscribe(_c: mqtt.Client, _u: Any, _mid: int, reasons: Any, _p: Any) -> None:
            # Without acks nothing would ever leave the spool, so a connection counts from here on. Without commands
            # a device still reports: a broker whose rules are older than they are is no reason to be lost.
            refused = any(reason.is_failure for reason in reasons[:2])
            if any(reason.is_failure for reason in reasons[2:3]):
                log.warning("the broker does not let this device take commands: %s", reasons[2])
            if any(reason.is_failure for reason in reasons[3:]):
                log.warning("the broker does not let this device speak for all of %s", ", ".join(self._devices[1:]))
            told = ", ".join(map(str, reasons))
            self._inbox.put((session, Lost(f"subscription refused: {told}") if refused else Connected(session)))

        def on_publish(_c: mqtt.Client, _u: Any, mid: int, reason: Any, _p: Any) -> None:
            channel = self._under_way.pop(mid, "unknown")
            if reason.is_failure:
                self._refused.add(f"{channel}: {reason}")

        def on_disconnect(_c: mqtt.Client, _u: Any, _f: Any, reason: Any, _p: Any) -> None:
            self._inbox.put((session, Lost(str(reason))))

        def on_message(_c: mqtt.Client, _u: Any, message: mqtt.MQTTMessage) -> None:
            event = self._decode(message)
            if event is not None:
                self._inbox.put((session, event))

        client.on_connect, client.on_subscribe, client.on_publish = on_connect, on_subscribe, on_publish
        client.on_disconnect, client.on_message = on_disconnect, on_message
        self._client, self._attempt_at = client, now
        self._under_way.clear()

        brokers.connect(client, self._broker, clean_session=True, later=True, max_packet=_MAX_PACKET)
        client.loop_start()

    def _accept(self, session: int, event: Event) -> Sequence[Event]:
        if session != self.session or self._client is None:
            return ()
        if isinstance(event, Connected):
            self.connected, self._failures = True, 0
            log.info("connected to %s:%d, session %d", self._broker.host, self._broker.port, session)
        elif isinstance(event, Lost):
            _abandon(self._client)
            self._client, self.connected = None, False
            self._try_later(event.reason)
        return (event,)

    def _try_later(self, reason: str) -> None:
        delay = backoff(self._failures, first_s=RECONNECT_FIRST_S, cap_s=RECONNECT_CAP_S)
        self._failures += 1
        # Spread out, so that a fleet does not return to a restarted broker in one moment.
        self._attempt_at = time.monotonic() + delay * random.uniform(0.5, 1.0)
        log.warning("no connection to %s:%d: %s", self._broker.host, self._broker.port, reason)

    def _decode(self, message: mqtt.MQTTMessage) -> Event | None:
        try:
            event = self._read(message.topic, bytes(message.payload), retained=message.retain)
        except Exception as error:
            # A LinkError as a rule. Anything else here would end the connection, and a retained payload each one.
            self._ignored.add(str(error))
            return None
        if self._inbox.qsize() >= MAX_WAITING:
            self._ignored.add(f"more than {MAX_WAITING} messages wait")
            return None
        return event

    def _read(self, topic: str, payload: bytes, *, retained: bool) -> Event:
        """What a message says; an empty hint takes the one before back. Raises LinkError for what is none of ours."""
        device, kind = self._channel.get(topic, (self._device, None))
        event: Heard
        if kind is Ack:
            event = decode(Ack, payload)
        elif kind is Desired:
            event = Hint(decode(Desired, payload) if payload else None, fresh=not retained)
        elif kind is None or retained:
            raise LinkError(f"topic {topic[:200]!r}", got="a retained command" if kind else "no command of this agent")
        else:
            event = decode(cast(type[Command], kind), payload, limit=MAX_COMMAND)
        return event if device == self._device else For(device, event)


class _Tally:
    """One line in the log a minute, of how often something happened and of the last time."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._count = 0
        self._told_at = -TOLD_EVERY_S

    def add(self, last: str) -> None:
        """Count once more."""
        self._count += 1
        now = time.monotonic()
        if now - self._told_at >= TOLD_EVERY_S:
            log.warning(self._line, self._count, last)
            self._count, self._told_at = 0, now


class Outflow:
    """Which spooled messages to send now: in order, so many unacknowledged, all again after a time-out.

    The time-out is that of the oldest unacknowledged message: acks of later ones do not put it off. Time is
    passed in, in seconds of any steady clock.
    """

    def __init__(
        self, *, in_flight: int = IN_FLIGHT, first_s: float = RESEND_FIRST_S, cap_s: float | None = None
    ) -> None:
        self._in_flight = in_flight
        self._first_s = first_s
        self._cap_s = first_s * RESEND_CAP if cap_s is None else cap_s
        self._fruitless = 0
        self._deadline = 0.0
        self._sent: dict[int, float] = {}
        """When each unacknowledged position was last sent, in the order of positions."""
        self._gaps: dict[int, float] = {}
        """Positions that the hub misses, with the time from which they may be sent again."""
        self._after = 0

    def restart(self) -> None:
        """Begin from the oldest again: the connection is new."""
        self._sent.clear()
        self._gaps.clear()
        self._after = 0

    def take(self, pending: Callable[[int, int], Sequence[Entry]], now_s: float) -> Sequence[Entry]:
        """What to send now.

        Args:
            pending: ``(after, limit)`` to the oldest entries behind a position: :meth:`Spool.pending`.
            now_s: the time.
        """
        if self._sent and now_s >= self._deadline:
            log.warning("no ack from the hub: sending %d messages again", len(self._sent))
            self._fruitless += 1
            self.restart()
        again = self._take_gaps(pending, now_s)
        room = self._in_flight - len(self._sent)
        entries = pending(self._after, room) if room else ()
        if entries:
            if not self._sent:
                self._set_deadline(now_s)
            self._after = entries[-1].position
            self._sent.update((entry.position, now_s) for entry in entries)
        return [*again, *entries]

    def acknowledged(self, positions: frozenset[int], now_s: float, *, gaps: frozenset[int] = frozenset()) -> None:
        """The hub has stored ``positions`` and misses ``gaps``, which lie before what it has."""
        oldest = self._oldest
        for position in positions:
            self._sent.pop(position, None)
        if positions:
            self._fruitless = 0
            # The hub is there: what waits behind a long back-off need not, but its own time-out is never put off.
            self._deadline = min(self._deadline, now_s + self._first_s)
            if self._oldest != oldest:
                self._set_deadline(now_s)
        for position in gaps & self._sent.keys():
            self._gaps.setdefault(position, self._sent[position] + min(GAP_S, self._first_s))

    @property
    def _oldest(self) -> int | None:
        return next(iter(self._sent), None)

    def _take_gaps(self, pending: Callable[[int, int], Sequence[Entry]], now_s: float) -> list[Entry]:
        due = sorted(position for position, at in self._gaps.items() if now_s >= at)
        entries: list[Entry] = []
        for position in due:
            del self._gaps[position]
            found = [entry for entry in pending(position - 1, 1) if entry.position == position]
            if not found:
                # Acknowledged meanwhile, or dropped from a full spool.
                self._sent.pop(position, None)
                continue
            entries += found
            self._sent[position] = now_s
            if position == self._oldest:
                self._set_deadline(now_s)
        return entries

    def _set_deadline(self, now_s: float) -> None:
        self._deadline = now_s + backoff(self._fruitless, first_s=self._first_s, cap_s=self._cap_s)


def backoff(failures: int, *, first_s: float, cap_s: float) -> float:
    """Seconds to wait after so many failures in a row: doubling, bounded."""
    return float(min(cap_s, first_s * 2.0 ** min(failures, 30)))


class _Client(mqtt.Client):
    """A client for one connection, whose thread tells how it ended, whatever ended it."""

    def __init__(self, *args: Any, ended: Callable[[str], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ended = ended

    def loop_forever(self, timeout: float = 1.0, retry_first_connection: bool = False) -> MQTTErrorCode:
        """Connect once and work until the connection ends. paho's own thread calls this."""
        reason = "the connection ended"
        try:
            return super().loop_forever(timeout)
        except Exception as error:
            # Whatever a broker sends, or paho makes of it, must end as one lost connection.
            reason = brokers.reason(error)
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        finally:
            self._ended(reason)

    def _sock_recv(self, bufsize: int) -> bytes:
        """Read a piece of a packet. paho would gather up to 256 MiB; what no message of ours can need is dropped."""
        del self._in_packet["packet"][_MAX_PACKET:]
        return super()._sock_recv(min(bufsize, _CHUNK))


def _abandon(client: mqtt.Client) -> None:
    """End a client's thread without waiting for it: its socket is shut, and it never reconnects by itself."""
    opened = client.socket()
    if opened is not None:
        with suppress(OSError):
            cast(socket.socket, opened).shutdown(socket.SHUT_RDWR)
