"""The wire as an AsyncAPI 3.0 document, made from the message kinds and topics, so that it cannot say anything else.

``python -m edgeguard.contract.asyncapi > docs/asyncapi.json`` writes it. Rules enforced here:

* a channel is named once, in :data:`CHANNELS`, with who sends, what, and how;
* payload schemas and descriptions are those of the structs that decode the messages;
* the same code gives the same bytes, on every version of Python.

What a schema cannot say, such as that a reply has a result when it is "ok" and only then, stands in the descriptions.

AsyncAPI 3.0.0, https://www.asyncapi.com/docs/reference/specification/v3.0.0; its MQTT operation binding 0.2.0.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import msgspec

from edgeguard.contract import topics
from edgeguard.contract.messages import (
    COMMANDS,
    MAX_COMMAND,
    MAX_PAYLOAD,
    REPLIES,
    Ack,
    Alert,
    Birth,
    Command,
    Desired,
    Health,
    Message,
    Reply,
    Report,
    Reported,
    Status,
)

Side = Literal["device", "hub"]


class Channel(NamedTuple):
    """One channel of a device: who sends which kind of message, with which quality of service, retained or not."""

    name: str
    sender: Side
    kind: type[Message]
    qos: Literal[0, 1] = 1
    retained: bool = False


CHANNELS: tuple[Channel, ...] = (
    Channel(topics.STATUS, "device", Status, retained=True),
    Channel(topics.BIRTH, "device", Birth, retained=True),
    Channel(topics.HEALTH, "device", Health, qos=0),
    Channel(topics.REPORT, "device", Report),
    Channel(topics.ALERT, "device", Alert),
    Channel(topics.ACK, "hub", Ack),
    Channel(topics.MODEL_DESIRED, "hub", Desired, retained=True),
    Channel(topics.MODEL_REPORTED, "device", Reported, retained=True),
    *(Channel(topics.command(name), "hub", kind) for name, kind in COMMANDS.items()),
    *(Channel(topics.reply(name), "device", kind) for name, kind in REPLIES.items()),
)

_ACTIONS: tuple[Literal["send", "receive"], ...] = ("send", "receive")
_PARAMETERS = {
    "fleet": {"description": f"Id of the fleet: `{topics.FLEET_ID}`."},
    "device": {
        "description": f"Id of the device: `{topics.DEVICE_ID}`; a microcontroller behind a gateway is `gateway~mcu`."
    },
}


def document() -> dict[str, Any]:
    """The document, as JSON's own types."""
    kinds = [channel.kind for channel in CHANNELS]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = _markdown(schema["description"])
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "EdgeGuard",
            "version": "1",
            "description": "What devices and the hub of a fleet say to each other over MQTT 3.1.1 or 5. Unknown fields"
            " are ignored; a message of another version `v` is refused.",
        },
        "defaultContentType": "application/json",
        "channels": {_key(channel): _channel(channel) for channel in CHANNELS},
        "operations": dict(_operations()),
        "components": {
            "parameters": _PARAMETERS,
            "messages": {kind.__name__: _message(kind) for kind in kinds},
            "schemas": schemas,
        },
    }


def _key(channel: Channel) -> str:
    """The channel's name in the document, where a slash would need escaping."""
    return channel.name.replace("/", ".")


def _channel(channel: Channel) -> dict[str, Any]:
    name = channel.kind.__name__
    return {
        "address": f"{topics.PREFIX}/{{fleet}}/{{device}}/{channel.name}",
        "messages": {name: {"$ref": f"#/components/messages/{name}"}},
        "parameters": {one: {"$ref": f"#/components/parameters/{one}"} for one in _PARAMETERS},
    }


def _operations() -> Iterator[tuple[str, dict[str, Any]]]:
    """What either side does with each channel."""
    for channel in CHANNELS:
        receiver = "hub" if channel.sender == "device" else "device"
        for side, action in zip((channel.sender, receiver), _ACTIONS, strict=True):
            binding = {"qos": channel.qos, "retain": channel.retained, "bindingVersion": "0.2.0"}
            operation = {"action": action, **_uses(channel), "bindings": {"mqtt": binding}}
            if issubclass(channel.kind, Command):
                answer = next(one for one in CHANNELS if one.kind is REPLIES[channel.kind.name])
                operation["reply"] = _uses(answer)
            yield f"{side}.{action}.{_key(channel)}", operation


def _uses(channel: Channel) -> dict[str, Any]:
    at = f"#/channels/{_key(channel)}"
    return {"channel": {"$ref": at}, "messages": [{"$ref": f"{at}/messages/{channel.kind.__name__}"}]}


def _message(kind: type[Message]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": kind.__name__,
        "title": kind.__name__,
        "summary": _markdown(kind.__doc__ or "").partition("\n\n")[0],
        "payload": {"$ref": f"#/components/schemas/{kind.__name__}"},
        "x-max-bytes": MAX_COMMAND if issubclass(kind, Command) else MAX_PAYLOAD,
    }
    if issubclass(kind, Command | Reply):
        described["correlationId"] = {"location": "$message.payload#/id"}
    return described


def _markdown(docstring: str) -> str:
    """A docstring's text in CommonMark. Python 3.13 takes the indentation out of docstrings, older ones do not."""
    return re.sub(r"``|:class:(?=`)", lambda found: "`" if found[0] == "``" else "", inspect.cleandoc(docstring))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(document(), indent=2) + "\n")
