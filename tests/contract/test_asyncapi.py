"""docs/asyncapi.json: up to date, well-formed, and true of what goes over the wire."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest

from edgeguard.contract import messages, topics
from edgeguard.contract.asyncapi import CHANNELS, Channel, document
from edgeguard.contract.messages import COMMANDS, REPLIES, Command, Message, Reply, decode, encode
from edgeguard.errors import LinkError
from tests.simulators.examples import EXAMPLES

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
DOCUMENT = document()
BY_KIND = {channel.kind: channel for channel in CHANNELS}


def name_of(channel: Channel) -> str:
    return channel.name.replace("/", ".")


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            else:
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def resolve(reference: str) -> Any:
    """What a reference within the document points at."""
    assert reference.startswith("#/")
    found: Any = DOCUMENT
    for part in reference[2:].split("/"):
        found = found[part]
    return found


def validator(kind: type[Message]) -> jsonschema.Draft7Validator:
    """A validator of a kind's payloads by the document alone."""
    return jsonschema.Draft7Validator(
        {**DOCUMENT["components"]["schemas"][kind.__name__], "components": DOCUMENT["components"]}
    )


def test_the_document_in_the_repository_is_what_the_code_makes() -> None:
    made = subprocess.run([sys.executable, "-m", "edgeguard.contract.asyncapi"], capture_output=True, check=True)
    assert (ROOT / "docs" / "asyncapi.json").read_bytes() == made.stdout, (
        "make it anew: see edgeguard.contract.asyncapi"
    )


def test_making_it_needs_msgspec_alone() -> None:
    program = (
        "import sys, edgeguard.contract.asyncapi as made; made.document();"
        "print({name.split('.')[0] for name in sys.modules} & {'numpy', 'paho', 'jsonschema', 'yaml', 'typer'})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_it_has_the_parts_that_asyncapi_3_asks_for() -> None:
    assert re.fullmatch(r"3\.0\.\d+", DOCUMENT["asyncapi"])
    assert {"title", "version"} <= DOCUMENT["info"].keys()
    for channel in DOCUMENT["channels"].values():
        assert set(re.findall(r"\{(\w+)\}", channel["address"])) == set(channel["parameters"])
        assert channel["messages"]
    for operation in DOCUMENT["operations"].values():
        assert operation["action"] in ("send", "receive")
        for used in (operation, *([operation["reply"]] if "reply" in operation else [])):
            assert resolve(used["channel"]["$ref"])
            # A message of an operation is named by way of its channel, not of the components.
            assert all(one["$ref"].startswith(used["channel"]["$ref"] + "/messages/") for one in used["messages"])
        assert operation["bindings"]["mqtt"].keys() == {"qos", "retain", "bindingVersion"}
    for message in DOCUMENT["components"]["messages"].values():
        assert {"name", "title", "summary", "payload"} <= message.keys()
        assert message["summary"]


def test_every_reference_leads_somewhere() -> None:
    found = set(references(DOCUMENT))
    assert len(found) > 50
    for reference in found:
        assert resolve(reference)


def test_every_kind_of_message_and_every_channel_is_in_it() -> None:
    assert set(BY_KIND) == {type(example) for example in EXAMPLES}
    assert {channel.name for channel in CHANNELS} == {
        *topics.DEVICE_CHANNELS,
        topics.ACK,
        topics.MODEL_DESIRED,
        *map(topics.command, COMMANDS),
        *map(topics.reply, REPLIES),
    }
    assert len(DOCUMENT["channels"]) == len(CHANNELS)
    assert len(DOCUMENT["operations"]) == 2 * len(CHANNELS)


@pytest.mark.parametrize("channel", CHANNELS, ids=name_of)
def test_a_channels_address_is_its_topic(channel: Channel) -> None:
    address = DOCUMENT["channels"][name_of(channel)]["address"]
    topic = address.format(fleet="plant-1", device="pi~mcu.2")
    assert topics.parse(topic) == ("plant-1", "pi~mcu.2", channel.name)


@pytest.mark.parametrize("channel", CHANNELS, ids=name_of)
def test_one_side_sends_and_the_other_receives(channel: Channel) -> None:
    other = {"device": "hub", "hub": "device"}[channel.sender]
    for key in (f"{channel.sender}.send", f"{other}.receive"):
        operation = DOCUMENT["operations"][f"{key}.{name_of(channel)}"]
        assert operation["bindings"]["mqtt"]["qos"] == channel.qos
        assert operation["bindings"]["mqtt"]["retain"] is channel.retained
    assert not issubclass(channel.kind, Command) or not channel.retained


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_the_channel_of_its_reply(name: str) -> None:
    for side in ("hub.send", "device.receive"):
        reply = DOCUMENT["operations"][f"{side}.cmd.{name}"]["reply"]
        assert reply["channel"]["$ref"] == f"#/channels/reply.{name}"


def test_commands_and_replies_name_what_they_have_in_common() -> None:
    for kind in BY_KIND:
        described = DOCUMENT["components"]["messages"][kind.__name__]
        assert ("correlationId" in described) == issubclass(kind, Command | Reply)


def test_every_payload_schema_is_a_json_schema() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft7Validator.check_schema(schema)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_the_golden_files_fit_their_schemas(path: Path) -> None:
    kind = getattr(messages, path.stem.split("-")[0])
    validator(kind).validate(json.loads(path.read_bytes()))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_schema_and_decoder_refuse_the_same_damage(example: Message) -> None:
    kind, check = type(example), validator(type(example))
    fields = msgspec.json.decode(encode(example))
    required = DOCUMENT["components"]["schemas"][kind.__name__]["required"]
    damaged = [{key: value for key, value in fields.items() if key != name} for name in required]
    hostile: tuple[object, ...] = ([[]], {"a": 1}, -2, 2**60)
    damaged += [{**fields, name: value} for name in fields for value in hostile]
    refused = 0
    for payload in damaged:
        try:
            decode(kind, msgspec.json.encode(payload))
        except LinkError:
            refused += 1
            assert not check.is_valid(payload), payload
        else:
            assert check.is_valid(payload), payload
    assert refused >= len(required)


def test_descriptions_are_plain_markdown() -> None:
    text = json.dumps(DOCUMENT)
    assert ":class:" not in text and "``" not in text and "\\n    " not in text


@pytest.mark.parametrize("channel", CHANNELS, ids=name_of)
def test_the_page_on_the_protocol_says_the_same_of_each_channel(channel: Channel) -> None:
    lines = (ROOT / "docs" / "protocol.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    name = re.sub("^(cmd|reply)/.*", r"\1/<name>", channel.name)
    (row,) = [row for row in rows if row[0] == f"`{name}`"]
    assert row[1] == channel.sender and channel.kind.__name__ in row[2].split(", ")
    assert row[3:5] == [str(channel.qos), "yes" if channel.retained else "no"]
