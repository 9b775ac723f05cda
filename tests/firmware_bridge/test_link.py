"""The serial link's messages and frames: what goes in comes out, and nothing else does."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.contract import scores
from edgeguard.errors import LinkError
from firmware_bridge.link import messages
from firmware_bridge.link.codec import MAX_WIRE, Decoder, encode, stuff, unstuff
from firmware_bridge.link.messages import (
    Ack,
    Alert,
    Blob,
    Channel,
    Choice,
    Clock,
    Command,
    Count,
    Health,
    Hello,
    Kind,
    Message,
    Number,
    Order,
    Outcome,
    Phase,
    Raw,
    Reply,
    Report,
    Several,
    Standing,
    Text,
    TransferBegin,
    TransferChunk,
    TransferConfirm,
    TransferEnd,
    TransferStatus,
    Welcome,
)

GOLDEN = Path(__file__).parent / "golden_frames.json"
DIGESTS = (b"\x11" * 32, b"\x22" * 32, b"\x33" * 32)

EXAMPLES: tuple[Message, ...] = (
    Hello(
        schema=messages.SCHEMA,
        boot=2**63 + 1,
        name="mcu-1",
        board="nucleo",
        library="1.0",
        detectors="linf,l1,logit",
        file_digest=DIGESTS[0],
        model_digest=DIGESTS[1],
        guard_digest=DIGESTS[2],
        sequence=7,
        slot_bytes=262144,
        standing=Standing.TRIAL,
    ),
    Welcome(schema=messages.SCHEMA, boot=2**63 + 1, unix_ms=1_800_000_000_123),
    Ack(sequence=65535),
    Report(
        number=3,
        started_ms=1_800_000_000_000,
        ended_ms=1_800_000_060_000,
        unchecked=1,
        histogram=(0, 4, *(0,) * 9, 2, *(0,) * 8),
        labels=(Count(label=0, inputs=4, flagged=0), Count(label=9, inputs=2, flagged=2)),
        evidence_label=9,
        evidence=2,
        channels=(Channel(channel=4095, inputs=2, total=-600), Channel(channel=0, inputs=1, total=32767)),
    ),
    Alert(number=4, at_ms=1_800_000_000_777, label=-1, scores=(0.5, float("inf"))),
    Health(uptime_ms=5, inputs=6, unchecked=1, lost=0, alerts_lost=2, damaged=3, inference_us=None),
    Command(transaction=0xDEADBEEF, order=Order.RESTART),
    Reply(transaction=0xDEADBEEF, outcome=Outcome.REFUSED, uptime_ms=9),
    Clock(unix_ms=1_800_000_000_123),
    TransferBegin(file_digest=DIGESTS[0], model_digest=DIGESTS[1], guard_digest=DIGESTS[2], sequence=8, size=100_000),
    TransferChunk(offset=224, data=bytes(range(224))),
    TransferEnd(file_digest=DIGESTS[0]),
    TransferStatus(file_digest=DIGESTS[0], phase=Phase.REFUSED, offset=448, cause=messages.Cause.DIGEST),
    TransferConfirm(number=1, file_digest=DIGESTS[0], sequence=8, standing=Standing.REVERTED),
)


def refused(frame: bytes) -> str:
    """Why an intact frame is no message."""
    decoder = Decoder()
    assert decoder.feed(frame) == []
    assert (decoder.damaged, decoder.refused) == (0, 1)
    return decoder.refusal


def framed(kind: int, payload: bytes, *, version: int = 1) -> bytes:
    """A frame whose checksum and length fit, whatever it holds."""
    frame = bytes((version, kind)) + len(payload).to_bytes(2, "little") + b"\0\0" + payload
    return stuff(frame + zlib.crc32(frame).to_bytes(4, "little")) + b"\0"


def values(kind: Kind) -> st.SearchStrategy[Any]:
    """Anything that a field may hold."""
    match kind:
        case Number(kind="f32"):
            return st.floats(width=32, allow_nan=False)
        case Number(kind=name, optional=optional):
            bits = 8 * messages.SIZES[name]
            low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if name[0] == "i" else (0, (1 << bits) - 1)
            return st.none() | st.integers(low, high - 1) if optional else st.integers(low, high)
        case Choice(of=of):
            return st.sampled_from(of)
        case Raw(size=size):
            return st.binary(min_size=size, max_size=size)
        case Text(most=most):
            return st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=most)
        case Blob(most=most):
            return st.binary(max_size=most)
        case Several():
            raise AssertionError("lists have rules between their fields")


PLAIN = [kind for kind in messages.MESSAGES if not any(isinstance(part, Several) for _, part in messages.fields(kind))]


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_every_value_of_a_message_survives_the_line(kind: type[Message]) -> None:
    @settings(max_examples=25, deadline=None)
    @given(st.fixed_dictionaries({name: values(part) for name, part in messages.fields(kind)}), st.integers(0, 65535))
    def check(content: dict[str, Any], sequence: int) -> None:
        message = kind(**({**content, "schema": messages.SCHEMA} if kind is Hello else content))
        assert Decoder().feed(encode(message, sequence)) == [(sequence, message)]

    check()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_the_golden_frames_are_what_is_written_and_read(example: Message) -> None:
    golden = bytes.fromhex(json.loads(GOLDEN.read_text())["frames"][type(example).__name__])
    assert encode(example, 0x1234) == golden
    assert Decoder().feed(golden) == [(0x1234, example)]


def test_the_schema_is_that_of_the_golden_frames() -> None:
    assert f"{messages.SCHEMA:08x}" == json.loads(GOLDEN.read_text())["schema"]


def test_there_is_a_golden_frame_for_every_message() -> None:
    assert [type(example) for example in EXAMPLES] == list(messages.MESSAGES)


def test_every_message_fits_a_frame_and_types_are_unique() -> None:
    assert max(messages.bounds(kind)[1] for kind in messages.MESSAGES) <= messages.MAX_PAYLOAD
    assert len(messages.BY_TYPE) == len(messages.MESSAGES)


def test_the_histogram_has_the_bins_of_every_other_device() -> None:
    assert messages.BINS == scores.BINS


@settings(deadline=None)
@given(st.binary(max_size=600))
def test_stuffing_removes_every_zero_and_is_undone(frame: bytes) -> None:
    stuffed = stuff(frame)
    assert 0 not in stuffed
    assert len(stuffed) <= len(frame) + 1 + len(frame) // 254
    assert unstuff(stuffed) == frame


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_nothing_that_a_line_brings_raises(noise: bytes) -> None:
    decoder = Decoder()
    decoder.feed(noise)
    assert decoder.feed(b"\0" + encode(Ack(sequence=1), 2)) == [(2, Ack(sequence=1))]


@pytest.mark.parametrize("size", [1, 2, 7, 100, 251, 1000])
def test_frames_arrive_whole_however_the_line_cuts_them(size: int) -> None:
    line = b"".join(encode(message, number) for number, message in enumerate(EXAMPLES))
    decoder, arrived = Decoder(), []
    for start in range(0, len(line), size):
        arrived += decoder.feed(line[start : start + size])
    assert arrived == list(enumerate(EXAMPLES))
    assert decoder.damaged == decoder.refused == 0


@pytest.mark.parametrize("at", range(0, 30, 3))
@pytest.mark.parametrize("what", ["flipped", "dropped", "doubled"])
def test_a_damaged_frame_is_counted_and_the_next_one_arrives(at: int, what: str) -> None:
    line = bytearray(encode(EXAMPLES[9], 1))
    if what == "flipped":
        line[at] ^= 0x10
    elif what == "dropped":
        del line[at]
    else:
        line.insert(at, line[at])
    decoder = Decoder()
    assert decoder.feed(bytes(line) + encode(Ack(sequence=1), 2)) == [(2, Ack(sequence=1))]
    assert decoder.damaged == 1


def test_what_never_ends_is_given_up_and_costs_no_memory() -> None:
    decoder = Decoder()
    for _ in range(100):
        assert decoder.feed(b"\x7f" * 1000) == []
    assert decoder.feed(b"\0" + encode(Ack(sequence=1), 2)) == [(2, Ack(sequence=1))]
    assert decoder.damaged == 1


def test_the_longest_frame_is_taken_and_one_byte_more_is_not() -> None:
    longest = framed(11, bytes(4) + b"\xe0" + b"\1" * 235)
    assert len(longest) == MAX_WIRE
    assert "of TransferChunk" in refused(longest)
    decoder = Decoder()
    decoder.feed(framed(11, b"\1" * 241))
    assert decoder.damaged == 1


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (framed(3, b"\1\0", version=2), "version 2"),
        (framed(15, b""), "type 15"),
        (framed(3, b"\1\0\0"), "3 bytes of Ack"),
        (framed(7, b"\1\0\0\0\3"), "3 is not a valid Order"),
        (framed(11, bytes(4) + b"\4abc"), "4 are said"),
        (framed(11, bytes(4) + b"\2abc"), "1 bytes behind"),
    ],
)
def test_a_frame_that_is_no_message_is_refused_with_the_reason(frame: bytes, why: str) -> None:
    assert why in refused(frame)


def test_a_decoder_takes_only_what_the_other_side_sends() -> None:
    decoder = Decoder("mcu")
    assert decoder.feed(encode(Clock(unix_ms=1), 1)) == []
    assert decoder.refused == 1
    assert decoder.feed(encode(EXAMPLES[0], 2) + encode(Ack(sequence=1), 3)) != []


REPORT = EXAMPLES[3]


@pytest.mark.parametrize(
    "changed",
    [
        {"number": 0},
        {"histogram": (0,) * 20},
        {"histogram": (0, 6, *(0,) * 18)},
        {"labels": (Count(label=0, inputs=4, flagged=0), Count(label=0, inputs=2, flagged=2))},
        {"labels": (Count(label=4096, inputs=4, flagged=0), Count(label=9, inputs=2, flagged=2))},
        {"labels": (Count(label=0, inputs=6, flagged=7),)},
        {"evidence": 3},
        {"evidence_label": 0},
        {"channels": (Channel(channel=1, inputs=3, total=1),)},
        {"channels": (Channel(channel=1, inputs=0, total=0),)},
        {"channels": (Channel(channel=1, inputs=1, total=32768),)},
        {"channels": (Channel(channel=1, inputs=1, total=1), Channel(channel=1, inputs=1, total=1))},
        {"channels": (Channel(channel=4096, inputs=1, total=1),)},
    ],
)
def test_a_report_that_does_not_add_up_is_no_report(changed: dict[str, Any]) -> None:
    content = {name: getattr(REPORT, name) for name, _ in messages.fields(Report)} | changed
    with pytest.raises(ValueError, match=r"that|than|without|range|odds|evidence"):
        Report(**content)


@pytest.mark.parametrize("scores", [(), (1.0,), (0.2, 0.3), (2.0, float("nan"))])
def test_an_alert_about_an_input_that_is_not_flagged_is_none(scores: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"alert|number"):
        Alert(number=1, at_ms=0, label=0, scores=scores)


@pytest.mark.parametrize(
    "message",
    [
        Ack(sequence=65536),
        Ack(sequence=-1),
        TransferChunk(offset=0, data=bytes(225)),
        TransferEnd(file_digest=bytes(31)),
        Health(uptime_ms=0, inputs=0, unchecked=0, lost=0, alerts_lost=0, damaged=0, inference_us=2**32 - 1),
    ],
)
def test_what_a_field_cannot_hold_is_not_sent(message: Message) -> None:
    with pytest.raises(LinkError, match="serial link"):
        encode(message, 0)
