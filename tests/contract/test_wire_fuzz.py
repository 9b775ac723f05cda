"""Whatever bytes come over the wire, as whatever kind: a checked message or a LinkError, and nothing else."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.contract.messages import MAX_PAYLOAD, Message, decode, encode
from edgeguard.errors import LinkError
from tests.simulators.examples import EXAMPLES

GOLDEN = tuple(path.read_bytes() for path in sorted((Path(__file__).parent / "golden").glob("*.json")))
TOKENS = (
    *(b"null", b"true", b"-1", b"0", b"-0", b"1.0", b"1e308", b"1e999", b"NaN", b"9" * 400, b"18446744073709551616"),
    *(b'""', b'"\\ud800"', b'"\\u0000"', b'"\xff"', b'"\xed\xa0\x80"', b"\xef\xbb\xbf"),
    *(b"[]", b"{}", b"[" * 3000, b'{"v":' * 3000),
)
"""What honest peers do not write."""
KINDS = st.sampled_from([type(example) for example in EXAMPLES])

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def damaged(payload: bytes, data: st.DataObject) -> bytes:
    """Some bytes changed, taken out or put in."""
    content = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        until = min(len(content), at + data.draw(st.integers(0, 6)))
        content[at:until] = data.draw(st.binary(max_size=3) | st.sampled_from(TOKENS))
    return bytes(content)


def check(kind: type[Message], payload: bytes) -> None:
    """The rule. What is accepted means the same once it is written again."""
    with suppress(LinkError):
        message = decode(kind, payload)
        assert type(message) is kind and message.v == 1
        assert decode(kind, encode(message)) == message


@settings(deadline=None)
@given(KINDS, st.binary(max_size=400))
def test_any_bytes(kind: type[Message], payload: bytes) -> None:
    check(kind, payload)


@settings(max_examples=300, deadline=None)
@given(KINDS, st.sampled_from(GOLDEN), st.data())
def test_a_damaged_message_of_the_same_or_another_kind(
    kind: type[Message], payload: bytes, data: st.DataObject
) -> None:
    check(kind, damaged(payload, data))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(EXAMPLES), st.data())
def test_any_value_in_any_field(example: Message, data: st.DataObject) -> None:
    fields = msgspec.json.decode(encode(example))
    for name in data.draw(st.sets(st.sampled_from(sorted(fields)), min_size=1, max_size=3)):
        fields[name] = data.draw(JSON)
    check(type(example), msgspec.json.encode(fields))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_what_no_honest_peer_writes_in_each_field(example: Message) -> None:
    fields = msgspec.json.decode(encode(example))
    for field in fields:
        marked = msgspec.json.encode({**fields, field: "?"})
        for token in TOKENS:
            check(type(example), marked.replace(b'"?"', token))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_a_message_cut_short_anywhere(example: Message) -> None:
    payload = encode(example)
    for end in range(len(payload)):
        with pytest.raises(LinkError):
            decode(type(example), payload[:end])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_a_message_of_exactly_the_limit_is_read_and_one_byte_more_is_not(example: Message) -> None:
    payload = encode(example).ljust(MAX_PAYLOAD)
    assert decode(type(example), payload) == example
    with pytest.raises(LinkError, match=f"got {MAX_PAYLOAD + 1} bytes; expected at most {MAX_PAYLOAD}"):
        decode(type(example), payload + b" ")


@pytest.mark.parametrize("field", ["boot", "model_digest", "guard_digest", "file_digest", "target", "id"])
def test_no_line_feed_follows_what_a_pattern_allows(field: str) -> None:
    found = [example for example in EXAMPLES if hasattr(example, field)]
    assert found
    for example in found:
        fields = msgspec.json.decode(encode(example))
        for ending in ("\n", "\r", "\n\n", "\u2028", "\0"):
            with pytest.raises(LinkError):
                decode(type(example), msgspec.json.encode({**fields, field: fields[field] + ending}))
