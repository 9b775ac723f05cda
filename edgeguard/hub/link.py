"""The hub's MQTT connection in a process of its own, ``python -m edgeguard.hub.link``, and the handle to it.

Half of what a report costs in Python is the MQTT client. In a process of its own it does not share an interpreter lock
with what decodes and stores: both work at the same time.

Rules enforced here:

* the process does what one connection needs and decides nothing: messages go up as they come, numbers to acknowledge
  and messages to publish come down. It never acknowledges by itself;
* nothing in it waits for anything but its select: a hub that does not read holds the broker back, not the other way
  round, and memory stays bounded;
* an acknowledgement names the connection that its message came on: on a newer one its number may mean another message;
* it ends with the process that started it, however that ended, and first sends what it was given to send. Signals for
  the group do not end it: the hub's last acknowledgements go through it;
* the broker may come, go and lie at any time: every end of a connection is told upwards and leads to another attempt.
"""

from __future__ import annotations

import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
import paho.mqtt.client as mqtt

from edgeguard import broker as brokers
from edgeguard.contract.messages import MAX_PAYLOAD
from edgeguard.errors import ConfigError
from edgeguard.settings import BrokerConfig

RECONNECT_FIRST_S = 0.5
RECONNECT_CAP_S = 10.0
CONNECT_TIMEOUT_S = 10.0
FRAME_MESSAGES = 128
FRAME_BYTES = 1 << 18
_WAITING_BYTES = 1 << 20
_OUTGOING = 20_000
_PIECE = 1 << 18
_LENGTH = struct.Struct(">I")
_PUBACK = struct.Struct(">BBH")
"""Type, length and number (MQTT 3.1.1 and 5, 3.4); without a reason code it means success."""
_FLUSH_S = 1.0


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to connect to, and as whom. The first frame down.

    ``secret``: the password, where there is one; ``after``: the number of the last connection of an earlier process.
    """

    broker: BrokerConfig
    client_id: str
    secret: str | None
    subscribe: tuple[tuple[str, int], ...]
    unsubscribe: tuple[str, ...]
    after: int = 0


class Arrived(NamedTuple):
    """One message. ``mid`` is its number on its connection."""

    topic: str
    payload: bytes
    mid: int
    qos: int
    retained: bool


class Arrivals(msgspec.Struct, frozen=True, tag="m", array_like=True):
    """Messages of one connection, in their order."""

    connection: int
    messages: list[Arrived]


class State(msgspec.Struct, frozen=True, tag="s", array_like=True):
    """A connection was made, or one ended and why."""

    connection: int
    connected: bool
    reason: str = ""


class Trouble(msgspec.Struct, frozen=True, tag="t", array_like=True):
    """What is wrong on a connection that stands."""

    text: str


class Down(msgspec.Struct, frozen=True, array_like=True):
    """Numbers to acknowledge on a connection, and messages to publish with QoS 1: topic, payload, retained."""

    connection: int
    mids: list[int]
    publish: list[tuple[str, bytes, bool]]


Up = Arrivals | State | Trouble
_to_up = msgspec.msgpack.Decoder(Up)
_to_down = msgspec.msgpack.Decoder(Down)
_encode = msgspec.msgpack.Encoder(enc_hook=str).encode


class Frames:
    """Cuts a stream of bytes into what was framed."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, piece: bytes) -> list[bytes]:
        """The frames that ``piece`` completes."""
        self._buffer += piece
        found: list[bytes] = []
        start = 0
        while len(self._buffer) >= start + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            found.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return found


def framed(message: msgspec.Struct) -> bytes:
    """A message with its length in front."""
    content = _encode(message)
    return _LENGTH.pack(len(content)) + content


class Link:
    """The handle: starts the process, and starts it anew where it died."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._lock = threading.Lock()
        self._frames = Frames()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._last = 0

    def start(self) -> None:
        """Start the process; it connects by itself. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=theirs.fileno(), stdout=subprocess.DEVNULL
            )
        self._frames = Frames()
        with self._lock:
            self._socket = ours
        self._send(framed(msgspec.structs.replace(self._order, after=self._last)))

    def receive(self) -> list[Up] | None:
        """What came, waiting for it. None when the process has ended."""
        opened = self._socket
        try:
            piece = opened.recv(_PIECE) if opened is not None else b""
        except OSError:
            return None
        if not piece:
            return None
        told = [_to_up.decode(frame) for frame in self._frames.feed(piece)]
        self._last = max((up.connection for up in told if not isinstance(up, Trouble)), default=self._last)
        return told

    def send(self, down: Down) -> None:
        """Acknowledge and publish. What cannot be sent is lost: whoever waits for it asks again."""
        self._send(framed(down))

    def close(self) -> None:
        """Let the process send what it has, and end. :meth:`receive` returns None then."""
        with self._lock, suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_WR)

    def end(self, wait_s: float) -> None:
        """See to it that the process has ended."""
        if self._process is not None:
            try:
                self._process.wait(wait_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _send(self, content: bytes) -> None:
        with self._lock, suppress(OSError):
            if self._socket is not None:
                self._socket.sendall(content)


class _Client(mqtt.Client):
    """A client that takes from its socket what is there at once, instead of byte by byte."""

    _ahead = memoryview(b"")

    def _sock_recv(self, bufsize: int) -> bytes:
        if not self._ahead:
            self._ahead = memoryview(super()._sock_recv(_PIECE))
        taken, self._ahead = bytes(self._ahead[:bufsize]), self._ahead[bufsize:]
        return taken

    @property
    def ahead(self) -> bool:
        """Whether there is something to read that ``select`` does not see."""
        opened = self.socket()
        return bool(self._ahead) or (isinstance(opened, ssl.SSLSocket) and opened.pending() > 0)


class EndedError(Exception):
    """The hub is gone, or has no more to say."""


class _Connection:
    """The process's side: one connection after the other."""

    def __init__(self, order: Order, hub: socket.socket) -> None:
        self._order = order
        self._hub = hub
        self._frames = Frames()
        self._number = order.after
        self._up = bytearray()
        self._arrived: list[Arrived] = []
        self._arrived_bytes = 0
        self._client: _Client | None = None
        self._accepted = False
        self._acks = bytearray()
        self._cut = False
        """Whether the first of these acknowledgements may have been sent in part."""

    def run(self) -> None:
        """Stay connected. Raises EndedError."""
        failures = 0
        while True:
            reason = self._connect_once()
            self._arrived.clear()
            self._arrived_bytes = 0
            self._tell(State(self._number, False, reason))
            self._client = None
            failures = 0 if self._accepted else failures + 1
            until = time.monotonic() + min(RECONNECT_CAP_S, RECONNECT_FIRST_S * 2.0 ** min(failures, 10))
            while (left := until - time.monotonic()) > 0:
                self._exchange([], [], left)

    def _connect_once(self) -> str:
        """One connection from beginning to end. Returns why it ended."""
        order = self._order
        self._number += 1
        self._accepted = self._cut = False
        self._acks.clear()
        reasons = ["the connection ended"]
        try:
            client = brokers.client(order.broker, order.client_id, order.secret, clean_session=False, kind=_Client)
        except ConfigError as error:
            return str(error)  # the files were good when the hub started: somebody is replacing them
        assert isinstance(client, _Client)
        client.manual_ack_set(True)
        client.max_queued_messages_set(_OUTGOING)
        client.max_inflight_messages_set(0)
        # paho would write at once, packet by packet, in whatever calls it: the loop below does, when there is room.
        client.on_socket_register_write = lambda _client, _userdata, _socket: None

        def on_connect(_c: mqtt.Client, _u: Any, _f: Any, reason: Any, properties: Any) -> None:
            if reason.is_failure:
                reasons.append(f"refused: {reason}")
                return
            brokers.keep_to_limits(client, properties)
            if order.unsubscribe:
                client.unsubscribe(list(order.unsubscribe))
            client.subscribe(list(order.subscribe))
            self._accepted = True
            self._tell(State(self._number, True))

        def on_subscribe(_c: mqtt.Client, _u: Any, _m: int, granted: Sequence[Any], _p: Any) -> None:
            if any(code.is_failure for code in granted):
                self._tell(Trouble(f"the broker refuses a subscription: {', '.join(map(str, granted))}"))

        def on_message(_c: mqtt.Client, _u: Any, message: mqtt.MQTTMessage) -> None:
            try:
                topic = message.topic
            except UnicodeDecodeError:
                topic = "not UTF-8"
            payload = bytes(message.payload[: MAX_PAYLOAD + 1])  # of a larger one, what shows that it is
            self._arrived.append(Arrived(topic, payload, message.mid, message.qos, message.retain))
            self._arrived_bytes += len(payload)

        client.on_connect, client.on_subscribe, client.on_message = on_connect, on_subscribe, on_message
        if order.broker.protocol == "5":
            client.on_publish = self._refusals()
        client.on_disconnect = lambda _c, _u, _f, reason, _p: reasons.append(str(reason))
        self._client = client
        try:
            brokers.connect(client, order.broker, clean_session=False)
            self._serve(client)
        except EndedError:
            self._leave(client)
            raise
        except Exception as error:
            # Whatever a broker sends, or paho makes of it, must end as one lost connection.
            reasons.append(brokers.reason(error))
        return reasons[-1]

    def _refusals(self) -> Callable[[mqtt.Client, Any, int, Any, Any], None]:
        """Tells why the broker refuses what is published, once for each reason: there may be as many as messages."""
        refused: set[str] = set()

        def on_publish(_c: mqtt.Client, _u: Any, _m: int, reason: Any, _p: Any) -> None:
            if reason.is_failure and str(reason) not in refused:
                refused.add(str(reason))
                self._tell(Trouble(f"the broker refuses what the hub publishes: {reason}"))

        return on_publish

    def _serve(self, client: _Client) -> None:
        """Read and write until the connection ends."""
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while (open_ := client.socket()) is not None:
            takes = len(self._up) < _WAITING_BYTES
            ahead = takes and client.ahead
            writes = bool(self._acks) or client.want_write()
            readable = self._exchange([open_] if takes else [], [open_] if writes else [], 0.0 if ahead else 1.0)
            if (ahead or open_ in readable) and not self._read(client):
                return
            if not self._write(client):
                return
            if client.loop_misc() != mqtt.MQTT_ERR_SUCCESS:
                return
            if not self._accepted and time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {CONNECT_TIMEOUT_S:g} s")

    def _write(self, client: _Client) -> bool:
        """Write what there is room for. Returns False when the connection has ended.

        paho writes each PUBACK by itself. Here those of a batch leave together, between two of paho's packets: paho
        writes only in ``loop_write``, and nothing is between its packets while it wants to write.
        """
        if not self._cut and client.want_write():
            return client.loop_write() == mqtt.MQTT_ERR_SUCCESS
        open_ = client.socket()
        if self._acks and open_ is not None:
            try:
                del self._acks[: open_.send(self._acks)]
                self._cut = bool(len(self._acks) % _PUBACK.size)
            except ssl.SSLWantWriteError:
                self._cut = True  # OpenSSL wants to be given the same bytes again before any others
            except BlockingIOError:
                pass
        return open_ is not None

    def _read(self, client: mqtt.Client) -> bool:
        """Take what has come, and send it up. Returns False when the connection has ended."""
        stands = True
        while stands and len(self._arrived) < FRAME_MESSAGES and self._arrived_bytes < FRAME_BYTES:
            before = len(self._arrived)
            stands = client.loop_read() == mqtt.MQTT_ERR_SUCCESS
            if len(self._arrived) == before:
                break
        if self._arrived:
            self._tell(Arrivals(self._number, self._arrived))
            self._arrived, self._arrived_bytes = [], 0
        return stands

    def _exchange(self, read: list[Any], write: list[Any], wait_s: float) -> list[Any]:
        """Wait, and do what there is to do with the hub. Returns what else may be read."""
        readable, writable, _ = select.select(
            [self._hub, *read], [*write, self._hub] if self._up else write, [], max(wait_s, 0.0)
        )
        if self._hub in writable:
            try:
                del self._up[: self._hub.send(self._up)]
            except OSError as error:
                raise EndedError from error
        if self._hub in readable:
            try:
                piece = self._hub.recv(_PIECE)
            except OSError as error:
                raise EndedError from error
            if not piece:
                raise EndedError
            for frame in self._frames.feed(piece):
                self._obey(_to_down.decode(frame))
        return readable

    def _obey(self, down: Down) -> None:
        client = self._client
        if client is None or not self._accepted:
            return
        if down.connection == self._number:
            for mid in down.mids:
                self._acks += _PUBACK.pack(0x40, 2, mid)
        for topic, payload, retained in down.publish:
            client.publish(topic, payload, qos=1, retain=retained)

    def _leave(self, client: _Client) -> None:
        """Write what is still to be written, for so long, and disconnect."""
        deadline = time.monotonic() + _FLUSH_S
        with suppress(OSError, ValueError):
            while self._acks or client.want_write():
                left = deadline - time.monotonic()
                open_ = client.socket()
                if left <= 0 or open_ is None or not select.select([], [open_], [], left)[1] or not self._write(client):
                    return
            client.disconnect()
            client.loop_write()

    def _tell(self, up: Up) -> None:
        self._up += framed(up)


def _order(hub: socket.socket) -> Order:
    frames = Frames()
    while True:
        piece = hub.recv(_PIECE)
        if not piece:
            raise EndedError
        for frame in frames.feed(piece):
            return msgspec.msgpack.decode(frame, type=Order, dec_hook=lambda wanted, text: wanted(text))


def main() -> None:
    """Serve the process that started this one, over its standard input, which is a socket."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=0) as hub, suppress(EndedError):
        _Connection(_order(hub), hub).run()


if __name__ == "__main__":
    main()
