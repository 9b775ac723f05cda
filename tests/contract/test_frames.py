"""Frames: any stream, cut anywhere, gives the same frames, and nothing that a liar sends does more than end it."""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.contract import frames
from edgeguard.contract.messages import MAX_FEATURES
from edgeguard.errors import LinkError

DIGEST = "a" * 64
Received = list[tuple[frames.AnyFrame, bytes]]

labels = st.none() | st.integers(-1, 4095)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(max_size=20)
shapes = st.lists(st.integers(1, 1 << 24), max_size=8).map(tuple)
inputs = st.builds(
    frames.Input, id=texts, encoding=st.sampled_from(["array", "image"]), dtype=st.just("uint8"), shape=shapes
)
results = st.builds(
    frames.Result,
    id=texts,
    predicted=labels,
    status=st.sampled_from(["clean", "flagged", "not checked", "not audited"]),
    policy=st.sampled_from(["pass", "mark", "withhold"]),
    score=numbers,
    scores=st.dictionaries(texts, numbers, max_size=3),
    p_value=numbers,
    stages=st.lists(texts, max_size=3).map(tuple),
    reason=texts,
    outputs=st.lists(st.builds(frames.Output, dtype=st.just("float32"), shape=shapes), max_size=3).map(tuple),
)
scored = st.builds(
    frames.Scored,
    model_digest=st.just(DIGEST),
    guard_digest=st.just(DIGEST),
    predicted=labels,
    scores=st.lists(numbers, min_size=1, max_size=4).map(tuple),
    detectors=st.lists(texts, min_size=1, max_size=4).map(tuple),
    p_value=numbers,
    features=st.integers(1, MAX_FEATURES),
)
any_frame = st.one_of(inputs, results, scored, st.builds(frames.Refused, id=texts, reason=texts))
streams = st.lists(st.tuples(any_frame, st.binary(max_size=300)), max_size=6)


def sent(stream: Received) -> bytes:
    return b"".join(frames.encode(frame, body) for frame, body in stream)


def expected(stream: Received) -> Received:
    """What a reader makes of them: ``bytes`` is the length of the body."""
    return [(msgspec.structs.replace(frame, bytes=len(body)), body) for frame, body in stream]


def pieces(content: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(content) + 1) for cut in cuts), len(content)]
    return [content[a:b] for a, b in itertools.pairwise(edges)]


def header(content: object) -> bytes:
    encoded = json.dumps(content).encode()
    return struct.pack("<I", len(encoded)) + encoded


@given(stream=streams, cuts=st.lists(st.integers(0, 10_000), max_size=12))
def test_any_split_of_a_stream_gives_the_same_frames(stream: Received, cuts: list[int]) -> None:
    reader = frames.Reader()
    found = [frame for piece in pieces(sent(stream), cuts) for frame in reader.feed(piece)]
    assert found == expected(stream)
    assert reader.empty


@given(stream=streams)
def test_byte_by_byte_each_frame_comes_with_its_last_byte(stream: Received) -> None:
    reader, found = frames.Reader(), 0
    ends = set(itertools.accumulate(len(frames.encode(*each)) for each in stream))
    for position, byte in enumerate(sent(stream), start=1):
        arrived = len(reader.feed(bytes((byte,))))
        assert arrived == (position in ends)
        found += arrived
    assert found == len(stream)


@given(stream=streams.filter(bool), cut=st.integers(1, 10_000))
def test_a_stream_that_is_cut_short_gives_the_frames_before_the_cut_and_says_so(stream: Received, cut: int) -> None:
    content = sent(stream)
    kept = content[: cut % len(content)]
    reader = frames.Reader()
    found = reader.feed(kept)
    assert found == expected(stream)[: len(found)]
    assert reader.empty == (sent(stream[: len(found)]) == kept)


@settings(max_examples=300)
@given(content=st.binary(max_size=400), cuts=st.lists(st.integers(0, 400), max_size=4))
def test_random_bytes_raise_nothing_but_a_link_error(content: bytes, cuts: list[int]) -> None:
    reader = frames.Reader()
    try:
        for piece in pieces(content, cuts):
            assert not reader.feed(piece)
    except LinkError:
        pass


@settings(max_examples=300)
@given(stream=streams.filter(bool), spots=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4))
def test_a_damaged_stream_is_read_or_refused_but_nothing_else_happens(
    stream: Received, spots: list[tuple[int, int]]
) -> None:
    content = bytearray(sent(stream))
    for position, value in spots:
        content[position % len(content)] = value
    with contextlib.suppress(LinkError):
        assert all(len(body) == frame.bytes for frame, body in frames.Reader().feed(bytes(content)))


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(0, 2**32 - 1),
    claimed=st.integers(0, 2**40),
    tail=st.binary(max_size=200),
)
def test_a_length_that_is_only_claimed_reserves_no_memory(length: int, claimed: int, tail: bytes) -> None:
    liars = (
        struct.pack("<I", length) + tail,
        header({"kind": "input", "encoding": "image", "bytes": claimed}) + tail,
    )
    for content in liars:
        tracemalloc.start()
        try:
            frames.Reader().feed(content)
        except LinkError:
            pass
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 64 * 1024


@pytest.mark.parametrize(
    ("too_long", "within"),
    [
        (struct.pack("<I", frames.MAX_HEADER + 1), struct.pack("<I", frames.MAX_HEADER)),
        (
            header({"kind": "input", "encoding": "image", "bytes": frames.MAX_BODY + 1}),
            header({"kind": "input", "encoding": "image", "bytes": frames.MAX_BODY}),
        ),
    ],
    ids=["header", "body"],
)
def test_a_length_beyond_the_bounds_is_refused_before_anything_of_it_is_read(too_long: bytes, within: bytes) -> None:
    assert frames.Reader().feed(within) == []
    with pytest.raises(LinkError):
        frames.Reader().feed(too_long)


def test_what_is_too_large_is_not_sent_either() -> None:
    with pytest.raises(LinkError, match="body of 67108865 bytes"):
        frames.encode(frames.Input(encoding="image"), bytes(frames.MAX_BODY + 1))
    with pytest.raises(LinkError, match="header"):
        frames.encode(frames.Refused(id="", reason="x" * frames.MAX_HEADER))


@pytest.mark.parametrize("version", [0, 2, 300])
def test_another_version_is_refused_by_number(version: int) -> None:
    with pytest.raises(LinkError, match=f"version {version}; expected version 1"):
        frames.Reader().feed(header({"kind": "of the future", "v": version}))


def test_unknown_fields_are_ignored() -> None:
    content = header({"kind": "refused", "id": "7", "reason": "r", "colour": {"of": ["the", "future"]}})
    assert frames.Reader().feed(content) == [(frames.Refused(id="7", reason="r"), b"")]


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "scored"},
        {"kind": "unheard of"},
        {"encoding": "image"},
        {"kind": "input", "encoding": "image", "bytes": -1},
        {"kind": "input", "encoding": "image", "bytes": 1.5},
        {"kind": "input", "encoding": "array", "dtype": "object", "shape": [1]},
        {"kind": "input", "encoding": "array", "dtype": "uint8", "shape": [0]},
        {"kind": "input", "encoding": "array", "dtype": "uint8", "shape": [1] * 9},
        {"kind": "input", "encoding": "image", "id": "x" * 129},
        [],
        None,
    ],
    ids=str,
)
def test_a_header_that_is_no_frame_is_refused(content: object) -> None:
    with pytest.raises(LinkError, match="frame; got"):
        frames.Reader().feed(header(content))


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 5000, b'{"kind":"refused","id":"\xff","reason":""}'])
def test_a_header_that_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(LinkError):
        frames.Reader().feed(struct.pack("<I", len(raw)) + raw)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_json_cannot_hold_arrives_as_unknown(score: float) -> None:
    sent_frame = frames.Scored(
        model_digest=DIGEST,
        guard_digest=DIGEST,
        predicted=1,
        scores=(score, 0.5),
        detectors=("linf", "l1"),
        p_value=None,
        features=1,
    )
    ((found, _),) = frames.Reader().feed(frames.encode(sent_frame))
    assert isinstance(found, frames.Scored)
    assert found.scores == (None, 0.5)
