"""What local programs and the agent say to each other over its Unix socket or a pipe: frames.

A frame is a little-endian u32, the length of a JSON header; the header; and as many raw bytes as its ``bytes`` says.
Rules enforced here:

* every header carries ``v``; another version is refused by number, never guessed at; unknown fields are ignored;
* lengths are bounded before anything of that length is read: whoever may write to the socket may be hostile;
* a stream that holds one broken frame is over: nothing tells where the next one would begin.

Example:
    >>> reader = Reader()
    >>> reader.feed(encode(Input(id="7", encoding="array", dtype="uint8", shape=(2,)), b"ab"))
    [(Input(v=1, bytes=2, id='7', encoding='array', dtype='uint8', shape=(2,)), b'ab')]
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgeguard.contract.messages import MAX_FEATURES, Digest, Label, Text
from edgeguard.errors import LinkError

MAX_HEADER = 64 << 10
MAX_BODY = 64 << 20

_LENGTH = struct.Struct("<I")

Version = Literal[1]
Id = Annotated[str, Meta(max_length=128)]
Body = Annotated[int, Meta(ge=0, le=MAX_BODY)]
Dimension = Annotated[int, Meta(ge=1, le=1 << 24)]
Shape = Annotated[tuple[Dimension, ...], Meta(max_length=8)]
Dtype = Literal["uint8", "int8", "int16", "int32", "int64", "float32", "float64", "bool"]


class Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag=str.lower):
    """Base of all frames. ``bytes`` is set by :func:`encode`."""

    v: Version = 1
    bytes: Body = 0


class Input(Frame, frozen=True, kw_only=True):
    """Program to agent: one input. The body is an ``array`` (C order, little-endian) or an ``image`` (JPEG, PNG).

    ``id`` comes back in the result. ``dtype`` and ``shape``, without a batch axis, are those of an array.
    """

    id: Id = ""
    encoding: Literal["array", "image"]
    dtype: Dtype | None = None
    shape: Shape = ()


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """One of the model's own outputs in a result's body, without the batch axis."""

    dtype: Dtype
    shape: Shape


class Result(Frame, frozen=True, kw_only=True):
    """Agent to program: the outcome for one input. The body holds ``outputs`` one after the other.

    ``policy`` is what the agent's configuration says about such a verdict; under ``withhold`` there are neither
    outputs nor a prediction. A score that is not a number is None.
    """

    id: Id
    predicted: Label | None
    status: Literal["clean", "flagged", "not checked", "not audited"]
    policy: Literal["pass", "mark", "withhold"]
    score: float | None
    scores: dict[Text, float | None]
    p_value: float | None
    stages: tuple[Text, ...]
    reason: Text
    outputs: Annotated[tuple[Output, ...], Meta(max_length=64)] = ()


class Refused(Frame, frozen=True, kw_only=True):
    """Agent to program: this input was not run, and why. Later ones may be."""

    id: Id
    reason: Text


class Scored(Frame, frozen=True, kw_only=True):
    """Program to agent, unanswered: what the program's own interpreter scored (``edgeguard.Interpreter``).

    The body is ``edgeguard_features``, float32 ``[features]``. ``scores`` are each over its threshold, in the order
    of the guard's detectors; one that is not a number is None.
    """

    model_digest: Digest
    guard_digest: Digest
    predicted: Label | None
    scores: Annotated[tuple[float | None, ...], Meta(min_length=1, max_length=64)]
    detectors: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=64)]
    p_value: float | None
    features: Annotated[int, Meta(ge=1, le=MAX_FEATURES)]


AnyFrame = Input | Result | Refused | Scored

_decoder = msgspec.json.Decoder(AnyFrame)


class _Probe(msgspec.Struct):
    v: int


def encode(frame: AnyFrame, body: bytes = b"") -> bytes:
    """The frame on the wire.

    Raises:
        LinkError: header or body are too large.
    """
    if frame.bytes != len(body):
        frame = msgspec.structs.replace(frame, bytes=len(body))
    header = msgspec.json.encode(frame)
    _check(len(header), len(body))
    return b"".join((_LENGTH.pack(len(header)), header, body))


class Reader:
    """Puts frames together from the pieces in which a stream brings them. ``max_body``: larger ones are refused."""

    def __init__(self, max_body: int = MAX_BODY) -> None:
        self._max_body = max_body
        self._buffer = bytearray()
        self._frame: AnyFrame | None = None

    def feed(self, piece: bytes | memoryview) -> list[tuple[AnyFrame, bytes]]:
        """Take what arrived; the frames that are complete now, each with its body.

        Raises:
            LinkError: not a frame, of another version, or too large. The stream cannot be read any further.
        """
        self._buffer += piece
        complete: list[tuple[AnyFrame, bytes]] = []
        while True:
            if self._frame is None:
                self._frame = self._header()
            if self._frame is None or len(self._buffer) < self._frame.bytes:
                return complete
            size = self._frame.bytes
            complete.append((self._frame, bytes(self._buffer[:size])))
            del self._buffer[:size]
            self._frame = None

    @property
    def empty(self) -> bool:
        """True between two frames: a stream that ends here was not cut short."""
        return self._frame is None and not self._buffer

    def _header(self) -> AnyFrame | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        _check(length, 0)
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        header = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        try:
            frame = _decoder.decode(header)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _refused(header, error) from error
        if frame.bytes > self._max_body:
            raise LinkError("frame", got=f"a body of {frame.bytes} bytes", expected=f"at most {self._max_body}")
        return frame


def _check(header: int, body: int) -> None:
    if header > MAX_HEADER or body > MAX_BODY:
        raise LinkError(
            "frame",
            got=f"a header of {header} and a body of {body} bytes",
            expected=f"at most {MAX_HEADER} and {MAX_BODY}",
        )


def _refused(header: bytes, error: Exception) -> LinkError:
    try:
        version = msgspec.json.decode(header, type=_Probe).v
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        version = 1
    if version != 1:
        return LinkError("frame", got=f"version {version}", expected="version 1")
    return LinkError("frame", got=str(error)[:300], expected="a header of JSON")
