"""The one definition of what gateway and microcontroller say to each other: both codecs are made from these classes.

``codec`` reads and writes them in Python; ``c_source`` writes the C that does the same. Numbers are little-endian, a
text or list stands behind one byte that counts it, and a message ends where its last field does.

Rules enforced here:

* every size is bounded, and the largest message fits one frame;
* counts that do not add up, and text beyond printable ASCII, make no message: either side may be broken or hostile;
* :func:`schema` is a checksum over every name, number and layout below. :class:`Hello` and :class:`Welcome` begin with
  it; peers whose checksums differ say nothing else to each other. These two first fields never change.

Who sends what again: ``RELIABLE`` messages are repeated until an :class:`Ack` names their frame's sequence number, one
at a time in each direction. A copy is known by what is inside: ``number`` of a report, alert or confirmation within its
boot, ``transaction`` of a command or reply. A transfer is a question and an answer: each of its messages to the
microcontroller is answered by a :class:`TransferStatus`, and asked again where that is missing.
"""

from __future__ import annotations

import enum
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_type_hints

import msgspec

VERSION = 1
"""Of the frame's own layout."""
MAX_PAYLOAD = 240
LABELS = 16
"""Classes that one report may count; a window that meets one more ends before it."""
CHANNELS = 9
DETECTORS = 6
CHUNK = 224
BINS = 20
"""Of the score histogram, as in ``edgeguard.contract.scores``."""
MAX_CHANNEL = 4095
MAX_LABEL = 4095
MAX_EXCESS = 32767
UNIT = 256
"""A channel's ``total`` counts in this fraction of the deviation that alone would bring a score to its threshold."""

Origin = Literal["mcu", "gateway", "both"]


@dataclass(frozen=True)
class Number:
    """``u8`` to ``u64``, ``i16``, ``i32``; ``f32`` is a float32, in C its bit pattern.

    ``optional``: the largest value that the type holds stands for None.
    """

    kind: str
    optional: bool = False


@dataclass(frozen=True)
class Raw:
    """Exactly so many bytes."""

    size: int


@dataclass(frozen=True)
class Text:
    """At most so many printable ASCII characters, behind a byte that counts them."""

    most: int


@dataclass(frozen=True)
class Blob:
    """At most so many bytes, behind a byte that counts them."""

    most: int


@dataclass(frozen=True)
class Several:
    """Exactly ``most`` elements where ``fixed``, else at most that many behind a byte that counts them."""

    of: Number | type[msgspec.Struct]
    most: int
    fixed: bool = False


@dataclass(frozen=True)
class Choice:
    """One byte, one of an enumeration's values."""

    of: type[enum.IntEnum]


Kind = Number | Raw | Text | Blob | Several | Choice

U16 = Annotated[int, Number("u16")]
U32 = Annotated[int, Number("u32")]
U64 = Annotated[int, Number("u64")]
I16 = Annotated[int, Number("i16")]
I32 = Annotated[int, Number("i32")]
Digest = Annotated[bytes, Raw(32)]


class Standing(enum.IntEnum):
    """Of the model that runs: it proved itself; it is on trial; or the one sent last failed its trial."""

    CONFIRMED = 0
    TRIAL = 1
    REVERTED = 2


class Order(enum.IntEnum):
    """What a command asks for."""

    PING = 0
    RESTART = 1
    REPORT = 2
    """End the window now, and send it."""


class Outcome(enum.IntEnum):
    """What became of a command."""

    OK = 0
    REFUSED = 1
    FAILED = 2


class Phase(enum.IntEnum):
    """Of a transfer. ``VERIFYING``: all bytes are there and are read back; ask again for the outcome. ``STAGED``: they
    have the digest, and the microcontroller restarts into them."""

    IDLE = 0
    RECEIVING = 1
    VERIFYING = 2
    STAGED = 3
    REFUSED = 4


class Cause(enum.IntEnum):
    """Why a transfer was refused."""

    NONE = 0
    NO_SLOT = 1
    TOO_LARGE = 2
    NOT_NEWER = 3
    ON_TRIAL = 4
    FLASH = 5
    DIGEST = 6


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages. ``TYPE`` stands in the frame; 0 is none."""

    TYPE: ClassVar[int] = 0
    ORIGIN: ClassVar[Origin] = "both"
    RELIABLE: ClassVar[bool] = False


class Hello(Message, frozen=True, kw_only=True):
    """At each start, and again until a :class:`Welcome` comes: what this is and what it runs.

    ``boot``: a number of this start; no other start of this device has it. ``detectors``: names, between commas.
    ``sequence``: of the release that runs. ``slot_bytes``: what a model may have, 0 where none can be taken.
    """

    TYPE: ClassVar[int] = 1
    ORIGIN: ClassVar[Origin] = "mcu"
    schema: U32
    boot: U64
    name: Annotated[str, Text(24)]
    board: Annotated[str, Text(24)]
    library: Annotated[str, Text(12)]
    detectors: Annotated[str, Text(40)]
    model_digest: Digest
    guard_digest: Digest
    file_digest: Digest
    sequence: U32
    slot_bytes: U32
    standing: Annotated[Standing, Choice(Standing)]


class Welcome(Message, frozen=True, kw_only=True):
    """The gateway heard the hello of ``boot``. One with another schema ends there."""

    TYPE: ClassVar[int] = 2
    ORIGIN: ClassVar[Origin] = "gateway"
    schema: U32
    boot: U64
    unix_ms: U64


class Ack(Message, frozen=True, kw_only=True):
    """The frame with this sequence number arrived, and what had to be kept of it is kept."""

    TYPE: ClassVar[int] = 3
    sequence: U16


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """How many inputs of a window were predicted as ``label``, and how many of these flagged."""

    label: I16
    inputs: U16
    flagged: U16


class Channel(msgspec.Struct, frozen=True, kw_only=True):
    """One feature among those that moved most: in how many flagged inputs at least, and how far in all of these.

    ``total`` adds up its deviations from what the guard expects of the predicted class, in ``1 / UNIT`` of the one that
    alone would bring a score to its threshold.
    """

    channel: U16
    inputs: U16
    total: I32

    @property
    def excess(self) -> float:
        """The mean deviation, in deviations that alone would bring a score to its threshold."""
        return self.total / self.inputs / UNIT


class Report(Message, frozen=True, kw_only=True):
    """A window: label -1 for a model without classes; times are the device's own.

    ``channels`` were gathered over ``evidence`` flagged inputs of ``evidence_label``, the label that most flagged
    inputs had for as long as it led.
    """

    TYPE: ClassVar[int] = 4
    ORIGIN: ClassVar[Origin] = "mcu"
    RELIABLE: ClassVar[bool] = True
    number: U32
    started_ms: U64
    ended_ms: U64
    unchecked: U16
    evidence_label: I16
    evidence: U16
    histogram: Annotated[tuple[int, ...], Several(Number("u16"), BINS, fixed=True)]
    labels: Annotated[tuple[Count, ...], Several(Count, LABELS)]
    channels: Annotated[tuple[Channel, ...], Several(Channel, CHANNELS)]

    @property
    def inputs(self) -> int:
        """All of them, the unchecked included."""
        return self.unchecked + sum(count.inputs for count in self.labels)

    def __post_init__(self) -> None:
        _require(self.number > 0, "a report without a number")
        _require(sum(self.histogram) == sum(c.inputs for c in self.labels), "a histogram that does not add up")
        _require(all(-1 <= c.label <= MAX_LABEL for c in self.labels), "a label out of range")
        _require(len({c.label for c in self.labels}) == len(self.labels), "a label that stands twice")
        flagged = {c.label: c.flagged for c in self.labels}
        _require(all(c.flagged <= c.inputs for c in self.labels), "more flagged than inputs")
        _require(sum(self.histogram[10:]) == sum(flagged.values()), "a histogram at odds with the flagged inputs")
        _require(self.evidence <= flagged.get(self.evidence_label, 0), "evidence of more than was flagged")
        _require(all(0 < c.inputs <= self.evidence for c in self.channels), "channels of more inputs than evidence has")
        _require(all(c.channel <= MAX_CHANNEL for c in self.channels), "a channel out of range")
        _require(all(abs(c.total) <= MAX_EXCESS * c.inputs for c in self.channels), "a deviation out of range")
        _require(len({c.channel for c in self.channels}) == len(self.channels), "a channel that stands twice")


class Alert(Message, frozen=True, kw_only=True):
    """One flagged input, at once. It is also counted in its window.

    ``scores``: one per detector, each over its threshold.
    """

    TYPE: ClassVar[int] = 5
    ORIGIN: ClassVar[Origin] = "mcu"
    RELIABLE: ClassVar[bool] = True
    number: U32
    at_ms: U64
    label: I16
    scores: Annotated[tuple[float, ...], Several(Number("f32"), DETECTORS)]

    def __post_init__(self) -> None:
        _require(self.number > 0, "an alert without a number")
        _require(-1 <= self.label <= MAX_LABEL, "a label out of range")
        _require(not any(math.isnan(score) for score in self.scores), "a score that is not a number")
        _require(max(self.scores, default=0.0) > 1.0, "an alert about an input that is not flagged")


class Health(Message, frozen=True, kw_only=True):
    """Every now and then, and the heartbeat. Counts are since the start.

    ``lost``: inputs that stand in no report. ``alerts_lost``: alerts that there was no room for; the windows count
    their inputs. ``damaged``: frames that arrived so. ``inference_us``: of the last input.
    """

    TYPE: ClassVar[int] = 6
    ORIGIN: ClassVar[Origin] = "mcu"
    uptime_ms: U64
    inputs: U32
    unchecked: U32
    lost: U32
    alerts_lost: U32
    damaged: U32
    inference_us: Annotated[int | None, Number("u32", optional=True)]


class Command(Message, frozen=True, kw_only=True):
    """Do this once. The same ``transaction`` again gets the same reply again."""

    TYPE: ClassVar[int] = 7
    ORIGIN: ClassVar[Origin] = "gateway"
    RELIABLE: ClassVar[bool] = True
    transaction: U32
    order: Annotated[Order, Choice(Order)]


class Reply(Message, frozen=True, kw_only=True):
    """What became of a command."""

    TYPE: ClassVar[int] = 8
    ORIGIN: ClassVar[Origin] = "mcu"
    RELIABLE: ClassVar[bool] = True
    transaction: U32
    outcome: Annotated[Outcome, Choice(Outcome)]
    uptime_ms: U64


class Clock(Message, frozen=True, kw_only=True):
    """The gateway's time. It also shows that the gateway is there: without one the microcontroller says hello again."""

    TYPE: ClassVar[int] = 9
    ORIGIN: ClassVar[Origin] = "gateway"
    unix_ms: U64


class TransferBegin(Message, frozen=True, kw_only=True):
    """A model of this digest, size and release follows. The same one as before goes on where it stopped."""

    TYPE: ClassVar[int] = 10
    ORIGIN: ClassVar[Origin] = "gateway"
    file_digest: Digest
    model_digest: Digest
    guard_digest: Digest
    sequence: U32
    size: U32


class TransferChunk(Message, frozen=True, kw_only=True):
    """Bytes of the model from ``offset`` on. One that does not begin where the last ended is answered, not written."""

    TYPE: ClassVar[int] = 11
    ORIGIN: ClassVar[Origin] = "gateway"
    offset: U32
    data: Annotated[bytes, Blob(CHUNK)]


class TransferEnd(Message, frozen=True, kw_only=True):
    """That was all: read it back, compare the digest, and restart into it on trial."""

    TYPE: ClassVar[int] = 12
    ORIGIN: ClassVar[Origin] = "gateway"
    file_digest: Digest


class TransferStatus(Message, frozen=True, kw_only=True):
    """The answer to each of the three above: ``offset`` is where the next chunk begins."""

    TYPE: ClassVar[int] = 13
    ORIGIN: ClassVar[Origin] = "mcu"
    file_digest: Digest
    phase: Annotated[Phase, Choice(Phase)]
    offset: U32
    cause: Annotated[Cause, Choice(Cause)]


class TransferConfirm(Message, frozen=True, kw_only=True):
    """After a trial: the self-test passed (``CONFIRMED``), or the former model runs again (``REVERTED``).

    ``file_digest`` and ``sequence`` are those of the model that was on trial.
    """

    TYPE: ClassVar[int] = 14
    ORIGIN: ClassVar[Origin] = "mcu"
    RELIABLE: ClassVar[bool] = True
    number: U32
    file_digest: Digest
    sequence: U32
    standing: Annotated[Standing, Choice(Standing)]


MESSAGES: tuple[type[Message], ...] = (
    Hello, Welcome, Ack, Report, Alert, Health, Command, Reply, Clock,
    TransferBegin, TransferChunk, TransferEnd, TransferStatus, TransferConfirm,
)  # fmt: skip
BY_TYPE = {message.TYPE: message for message in MESSAGES}

SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "i16": 2, "i32": 4, "f32": 4}


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def fields(struct: type[msgspec.Struct]) -> Iterator[tuple[str, Kind]]:
    """The fields of a message, or of an element of one, in the order of the wire."""
    hints = get_type_hints(struct, include_extras=True)
    for name in struct.__struct_fields__:
        yield name, hints[name].__metadata__[0]


def bounds(kind: Kind | type[msgspec.Struct]) -> tuple[int, int]:
    """How few and how many bytes a field or a whole struct takes."""
    match kind:
        case Number():
            return (SIZES[kind.kind],) * 2
        case Raw():
            return (kind.size,) * 2
        case Choice():
            return 1, 1
        case Text() | Blob():
            return 1, 1 + kind.most
        case Several():
            least, most = bounds(kind.of)
            return (kind.most * least, kind.most * most) if kind.fixed else (1, 1 + kind.most * most)
    each = [bounds(part) for _, part in fields(kind)]
    return sum(low for low, _ in each), sum(high for _, high in each)


def _described(kind: Kind | type[msgspec.Struct]) -> str:
    match kind:
        case Number():
            return kind.kind + ("?" if kind.optional else "")
        case Raw() | Text() | Blob():
            size = kind.size if isinstance(kind, Raw) else kind.most
            return f"{type(kind).__name__.lower()}[{size}]"
        case Choice(of=of):
            return f"{of.__name__}({','.join(f'{item.name}={item.value}' for item in of)})"
        case Several(of=of, most=most, fixed=fixed):
            return f"{'array' if fixed else 'list'}[{most}]({_described(of)})"
    return f"{kind.__name__}({','.join(f'{name}:{_described(part)}' for name, part in fields(kind))})"


def layout() -> str:
    """Everything that both sides must agree on, as text: a message a line."""
    lines = [f"version {VERSION}"]
    for message in MESSAGES:
        lines.append(f"{message.TYPE} {message.ORIGIN} {int(message.RELIABLE)} {_described(message)}")
    return "\n".join(lines) + "\n"


SCHEMA = zlib.crc32(layout().encode())
"""The checksum of :func:`layout` (CRC-32)."""
