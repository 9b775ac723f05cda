"""The wire does not change by accident: golden files of every message kind, old ones for ever.

``golden/KIND.json`` holds the first form of a kind, ``golden/KIND-2.json`` the second, and so on: when a kind gains a
field, the file that is there stays and another is added. ``golden/SHA256SUMS`` lists them all, as ``sha256sum`` writes
it; a line, once there, is never changed or taken out.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeguard.contract import messages
from edgeguard.contract.messages import COMMANDS, REPLIES, Command, Message, Reply, decode, encode
from edgeguard.errors import LinkError
from tests.simulators.examples import EXAMPLES

GOLDEN = Path(__file__).parent / "golden"
KINDS = {
    name: kind
    for name, kind in vars(messages).items()
    if isinstance(kind, type) and issubclass(kind, Message) and kind not in (Message, Command, Reply)
}
LISTED = {line[66:]: line[:64] for line in (GOLDEN / "SHA256SUMS").read_text().splitlines()}
"""Digest of each golden file."""


def kind_of(file: str) -> type[Message]:
    return KINDS[re.split(r"[-.]", file)[0]]


def forms(kind: type[Message]) -> list[str]:
    """The golden files of a kind, the newest last."""
    found = [file for file in LISTED if kind_of(file) is kind]
    return sorted(found, key=lambda file: int((re.findall(r"-(\d+)", file) or ["1"])[0]))


def test_every_kind_of_message_has_a_golden_file_and_an_example() -> None:
    assert {kind_of(file) for file in LISTED} == set(KINDS.values()) == {type(example) for example in EXAMPLES}
    assert {*COMMANDS.values(), *REPLIES.values()} < set(KINDS.values())


@pytest.mark.parametrize("file", LISTED)
def test_a_golden_file_once_there_is_never_changed(file: str) -> None:
    assert hashlib.sha256((GOLDEN / file).read_bytes()).hexdigest() == LISTED[file]


def test_every_golden_file_is_listed() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {*LISTED, "SHA256SUMS"}


def holds(now: Any, then: Any) -> bool:
    """Whether a value says what an older one said; it may say more."""
    if isinstance(then, dict):
        return all(key in now and holds(now[key], inner) for key, inner in then.items())
    if isinstance(then, list):
        return len(now) == len(then) and all(map(holds, now, then))
    return bool(now == then)


@pytest.mark.parametrize("file", LISTED)
def test_what_was_once_written_is_read_for_ever(file: str) -> None:
    payload = (GOLDEN / file).read_bytes()
    decoded = decode(kind_of(file), payload)
    assert holds(msgspec.json.decode(encode(decoded)), msgspec.json.decode(payload))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_a_message_is_written_as_in_the_newest_golden_file_of_its_kind_and_read_back(example: Message) -> None:
    payload = (GOLDEN / forms(type(example))[-1]).read_bytes()
    assert encode(example) == payload
    assert decode(type(example), payload) == example


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_an_example_gives_every_field(example: Message) -> None:
    left_out = {
        field.name
        for field in msgspec.structs.fields(example)
        if field.name not in ("v", "reason") and getattr(example, field.name) == field.default
    }
    assert not left_out


def everywhere(value: Any) -> Any:
    """The value with a field from the future in each of its objects."""
    if isinstance(value, dict):
        return {**{key: everywhere(inner) for key, inner in value.items()}, "from_the_future": [{"v": 9}]}
    return [everywhere(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_fields_from_the_future_are_ignored(example: Message) -> None:
    fields = everywhere(msgspec.json.decode(encode(example)))
    if "scores" in fields:
        fields["scores"] = {"linf": 3.5, "l1": 1.25}  # names of detectors, not fields
    assert decode(type(example), msgspec.json.encode(fields)) == example


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_a_message_without_a_version_is_of_the_first(example: Message) -> None:
    fields = msgspec.json.decode(encode(example))
    del fields["v"]
    assert decode(type(example), msgspec.json.encode(fields)) == example


@pytest.mark.parametrize("version", [0, 2, -1, 2**63])
@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.__name__)
def test_another_version_is_refused_by_its_number_whatever_else_it_says(kind: type[Message], version: int) -> None:
    for payload in (b'{"v":%d}' % version, b'{"all":"new","v":%d,"boot":7}' % version):
        with pytest.raises(LinkError, match=rf"{kind.__name__} message; got version {version}; expected version 1"):
            decode(kind, payload)
