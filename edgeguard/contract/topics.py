"""MQTT topics: ``edgeguard/v1/<fleet>/<device>/<channel>``, and the ids that may stand in them.

Rules enforced here:

* an id matches ``[a-z0-9][a-z0-9._-]{0,62}``; a microcontroller behind a gateway is ``<gateway>~<mcu>``;
* therefore no id can hold a wildcard, a slash or a control character, and a topic names one device only.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from edgeguard.errors import ConfigError, LinkError

PREFIX = "edgeguard/v1"

STATUS = "status"
BIRTH = "birth"
HEALTH = "health"
REPORT = "report"
ALERT = "alert"
ACK = "ack"
MODEL_DESIRED = "model/desired"
MODEL_REPORTED = "model/reported"
COMMAND = "cmd"
REPLY = "reply"
PRIVATE = "private"
"""A device's sealed submission to a round of private aggregation, retained. The hub does not read it."""

DEVICE_CHANNELS = (STATUS, BIRTH, HEALTH, REPORT, ALERT, MODEL_REPORTED)
"""Channels that a device writes and the hub reads."""

FLEET_ID = r"[a-z0-9][a-z0-9._-]{0,62}"
DEVICE_ID = rf"{FLEET_ID}(?:~{FLEET_ID})?"
_FLEET = re.compile(FLEET_ID)
_DEVICE = re.compile(DEVICE_ID)


class Address(NamedTuple):
    """One parsed topic."""

    fleet: str
    device: str
    channel: str


def check_fleet(fleet: str, what: str = "fleet id") -> str:
    """Return ``fleet`` unchanged. Raises ConfigError, naming ``what``, if it is not a valid id."""
    if not _FLEET.fullmatch(fleet):
        raise ConfigError(what, got=repr(fleet[:200]), expected=f"an id like {FLEET_ID}", do="choose another name")
    return fleet


def check_device(device: str, what: str = "device id") -> str:
    """Return ``device`` unchanged. Raises ConfigError, naming ``what``, if it is no id and no ``<gateway>~<mcu>``."""
    if not _DEVICE.fullmatch(device):
        raise ConfigError(what, got=repr(device[:200]), expected=f"an id like {FLEET_ID}", do="choose another name")
    return device


def gateway_of(device: str) -> str | None:
    """The gateway that a microcontroller is behind, None for any other device."""
    gateway, behind, _ = device.partition("~")
    return gateway if behind else None


def topic(fleet: str, device: str, channel: str) -> str:
    """The topic of one channel of one device. Raises ConfigError on an invalid id."""
    return f"{PREFIX}/{check_fleet(fleet)}/{check_device(device)}/{channel}"


def subscription(fleet: str, channel: str) -> str:
    """The filter that matches ``channel`` of every device of a fleet."""
    return f"{PREFIX}/{check_fleet(fleet)}/+/{channel}"


def command(name: str) -> str:
    """The channel of one command, hub to device; ``+`` for all of them. QoS 1, never retained."""
    return f"{COMMAND}/{name}"


def reply(name: str) -> str:
    """The channel of the replies to one command, device to hub. QoS 1, not retained."""
    return f"{REPLY}/{name}"


def parse(text: str) -> Address:
    """Split a received topic. Raises LinkError if it is not one of ours."""
    parts = text.split("/", 4)
    if (
        len(parts) != 5
        or "/".join(parts[:2]) != PREFIX
        or not _FLEET.fullmatch(parts[2])
        or not _DEVICE.fullmatch(parts[3])
    ):
        raise LinkError(f"topic {text[:200]!r}", expected=f"{PREFIX}/<fleet>/<device>/<channel>")
    return Address(parts[2], parts[3], parts[4])
