"""Messages into frames and back. Pure; bytes come in whatever pieces the line brings.

A frame is ``version u8, type u8, length u16, sequence u16, payload, CRC-32`` (little-endian; the checksum of zlib, over
all before it) in COBS (Cheshire and Baker: Consistent Overhead Byte Stuffing, 1999), and then a zero byte. So a zero
never stands inside a frame, and a reader that lost its way finds the next one.

Rules enforced here:

* nothing is looked at before its checksum fits, and then not before its length fits both frame and type;
* what arrives damaged is dropped and counted, never repaired and never guessed at;
* a frame that is intact but no message (another version, an unknown type, values out of range) is counted apart;
* of a hello with another schema nothing is read but that and its boot, with which every schema's hello begins.

Example:
    >>> decoder = Decoder()
    >>> decoder.feed(encode(Ack(sequence=7), sequence=3))
    [Received(sequence=3, message=Ack(sequence=7))]
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple

import msgspec

from edgeguard.errors import LinkError
from firmware_bridge.link.messages import (
    BY_TYPE,
    MAX_PAYLOAD,
    SCHEMA,
    SIZES,
    VERSION,
    Ack,
    Blob,
    Choice,
    Hello,
    Kind,
    Message,
    Number,
    Origin,
    Raw,
    Several,
    Standing,
    Text,
    bounds,
    fields,
)

__all__ = ["MAX_WIRE", "Ack", "Decoder", "Received", "encode", "stuff", "unstuff"]

HEADER = struct.Struct("<BBHH")
CHECKSUM = 4
HELLO = struct.Struct("<IQ")
"""What the hello of every schema begins with: the schema and the boot."""
MAX_FRAME = HEADER.size + MAX_PAYLOAD + CHECKSUM
MAX_WIRE = MAX_FRAME + 2
"""Bytes on the line: a frame shorter than 255 grows by one byte, and the zero."""

_FORMATS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i16": "h", "i32": "i", "f32": "f"}
_FIELDS = {message: tuple(fields(message)) for message in BY_TYPE.values()}
_BOUNDS = {message: bounds(message) for message in BY_TYPE.values()}


class Received(NamedTuple):
    """One message and its frame's sequence number, which an acknowledgement names."""

    sequence: int
    message: Message


def encode(message: Message, sequence: int) -> bytes:
    """The message as it goes on the line, its closing zero included.

    Args:
        message: any of :data:`firmware_bridge.link.messages.MESSAGES`.
        sequence: of the frame, modulo 65,536.

    Raises:
        LinkError: a value that its field cannot hold.
    """
    payload = bytearray()
    try:
        for name, kind in _FIELDS[type(message)]:
            _write(payload, kind, getattr(message, name))
    except (struct.error, OverflowError, UnicodeEncodeError, ValueError) as error:
        raise LinkError(f"{type(message).__name__} for the serial link", got=str(error)[:200]) from error
    frame = HEADER.pack(VERSION, message.TYPE, len(payload), sequence & 0xFFFF) + payload
    return stuff(frame + zlib.crc32(frame).to_bytes(CHECKSUM, "little")) + b"\0"


class Decoder:
    """Puts frames together from the pieces in which a line brings them.

    Args:
        sender: only messages that this side sends are taken; None takes all.

    ``damaged`` counts frames that did not arrive as they were sent; ``refused`` those that did and are no message,
    and ``refusal`` says why the last one was not.
    """

    def __init__(self, sender: Origin | None = None) -> None:
        self._sender = sender
        self._pending = bytearray()
        self._overlong = False
        self.damaged = 0
        self.refused = 0
        self.refusal = ""

    def feed(self, piece: bytes | memoryview) -> list[Received]:
        """Take what arrived; the messages that are complete now, in order."""
        found: list[Received] = []
        *ends, rest = bytes(piece).split(b"\0")
        for part in ends:
            self._add(part)
            received = self._close()
            if received is not None:
                found.append(received)
        self._add(rest)
        return found

    def _add(self, part: bytes) -> None:
        if len(self._pending) + len(part) >= MAX_WIRE:
            self._overlong = True
            self._pending.clear()
        elif not self._overlong:
            self._pending += part

    def _close(self) -> Received | None:
        stuffed, overlong = bytes(self._pending), self._overlong
        self._pending.clear()
        self._overlong = False
        if not stuffed and not overlong:  # two zeros in a row end nothing
            return None
        frame = None if overlong else unstuff(stuffed)
        if frame is None or not _intact(frame):
            self.damaged += 1
            return None
        try:
            return self._message(frame)
        except ValueError as error:
            self.refused += 1
            self.refusal = str(error)[:200]
            return None

    def _message(self, frame: bytes) -> Received:
        version, number, length, sequence = HEADER.unpack_from(frame)
        if version != VERSION:
            raise ValueError(f"a frame of version {version} instead of {VERSION}")
        kind = BY_TYPE.get(number)
        if kind is None or (self._sender is not None and kind.ORIGIN not in (self._sender, "both")):
            raise ValueError(f"a message of type {number}, which the {self._sender or 'peer'} does not send")
        foreign = _foreign_hello(frame[HEADER.size : -CHECKSUM]) if kind is Hello else None
        if foreign is not None:
            return Received(sequence, foreign)
        least, most = _BOUNDS[kind]
        if not least <= length <= most:
            raise ValueError(f"{length} bytes of {kind.__name__}")
        reader = _Reader(frame[HEADER.size : -CHECKSUM])
        message = kind(**{name: reader.read(part) for name, part in _FIELDS[kind]})
        if reader.left:
            raise ValueError(f"{reader.left} bytes behind a {kind.__name__}")
        return Received(sequence, message)


def _foreign_hello(payload: bytes) -> Hello | None:
    """A hello of another schema, empty but for that and its boot."""
    if len(payload) < HELLO.size:
        return None
    schema, boot = HELLO.unpack_from(payload)
    if schema == SCHEMA:
        return None
    unknown = bytes(32)
    return Hello(
        schema=schema,
        boot=boot,
        name="",
        board="",
        library="",
        detectors="",
        model_digest=unknown,
        guard_digest=unknown,
        file_digest=unknown,
        sequence=0,
        slot_bytes=0,
        standing=Standing.CONFIRMED,
    )


def _intact(frame: bytes) -> bool:
    """Whether the checksum fits, and the length that the frame says is the one that it has."""
    if len(frame) < HEADER.size + CHECKSUM:
        return False
    if zlib.crc32(frame[:-CHECKSUM]) != int.from_bytes(frame[-CHECKSUM:], "little"):
        return False
    return bool(HEADER.unpack_from(frame)[2] == len(frame) - HEADER.size - CHECKSUM)


def stuff(frame: bytes) -> bytes:
    """COBS without the closing zero: each block of up to 254 bytes behind a byte that says where the next zero was."""
    out = bytearray()
    blocks = frame.split(b"\0")
    for number, block in enumerate(blocks):
        rest = block
        while len(rest) > 254 or (len(rest) == 254 and number < len(blocks) - 1):
            out += b"\xff" + rest[:254]
            rest = rest[254:]
        out += bytes((len(rest) + 1,)) + rest
    return bytes(out)


def unstuff(stuffed: bytes) -> bytes | None:
    """What :func:`stuff` was given; None where it was given nothing that looks like this."""
    out = bytearray()
    at = 0
    while at < len(stuffed):
        code = stuffed[at]
        block = stuffed[at + 1 : at + code]
        if code == 0 or len(block) < code - 1 or 0 in block:
            return None
        out += block
        at += code
        if code < 255 and at < len(stuffed):
            out.append(0)
    return bytes(out)


def _write(out: bytearray, kind: Kind, value: Any) -> None:
    match kind:
        case Number(kind=name, optional=optional):
            largest = (1 << 8 * SIZES[name]) - 1
            if optional and value == largest:
                raise ValueError(f"{value}, which stands for unknown")
            out += struct.pack("<" + _FORMATS[name], largest if optional and value is None else value)
        case Choice(of=of):
            out.append(of(value).value)
        case Raw(size=size):
            _counted(value, size, size)
            out += value
        case Text(most=most):
            encoded = value.encode("ascii")
            if not _printable(encoded):
                raise ValueError("text beyond printable ASCII")
            out += _counted(encoded, 0, most) + encoded
        case Blob(most=most):
            out += _counted(value, 0, most) + value
        case Several(of=of, most=most, fixed=fixed):
            count = _counted(value, most if fixed else 0, most)
            out += b"" if fixed else count
            for one in value:
                _write_one(out, of, one)


def _write_one(out: bytearray, of: Number | type[msgspec.Struct], value: Any) -> None:
    if isinstance(of, Number):
        _write(out, of, value)
        return
    for name, kind in fields(of):
        _write(out, kind, getattr(value, name))


def _counted(value: Any, least: int, most: int) -> bytes:
    if not least <= len(value) <= most:
        raise ValueError(f"{len(value)} of what may be {least} to {most}")
    return bytes((len(value),))


def _printable(text: bytes) -> bool:
    return all(0x20 <= byte < 0x7F for byte in text)


class _Reader:
    """Takes a payload apart. Raises ValueError where it does not hold what is asked for."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._payload) - self._at

    def read(self, kind: Kind) -> Any:
        match kind:
            case Number(kind=name, optional=optional):
                (value,) = struct.unpack("<" + _FORMATS[name], self._take(SIZES[name]))
                return None if optional and value == (1 << 8 * SIZES[name]) - 1 else value
            case Choice(of=of):
                return of(self._take(1)[0])
            case Raw(size=size):
                return self._take(size)
            case Text(most=most):
                text = self._take(self._count(most))
                if not _printable(text):
                    raise ValueError("text beyond printable ASCII")
                return text.decode("ascii")
            case Blob(most=most):
                return self._take(self._count(most))
            case Several(of=of, most=most, fixed=fixed):
                return tuple(self._one(of) for _ in range(most if fixed else self._count(most)))

    def _one(self, of: Number | type[msgspec.Struct]) -> Any:
        return self.read(of) if isinstance(of, Number) else of(**{name: self.read(kind) for name, kind in fields(of)})

    def _count(self, most: int) -> int:
        count = self._take(1)[0]
        if count > most:
            raise ValueError(f"{count} of what may be at most {most}")
        return count

    def _take(self, size: int) -> bytes:
        if self.left < size:
            raise ValueError(f"{self.left} bytes left where {size} are said to be")
        self._at += size
        return self._payload[self._at - size : self._at]
