"""What was set up and who was enrolled: the one file that the broker's files follow from.

Rules enforced here:

* a change is a function from one registry to the next; nothing is ever forgotten of a device: a serial number that was
  revoked stays so, also when the device is enrolled again;
* no key and no password stands in it, but the broker's hashes of passwords do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgeguard.contract import topics
from edgeguard.errors import ConfigError


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate that was issued.

    Attributes:
        serial: serial number in hexadecimal.
        expires: when it ends.
        revoked: when it was revoked.
    """

    serial: Annotated[str, Meta(pattern="^[0-9a-f]{1,40}$")]
    expires: datetime
    revoked: datetime | None = None


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A device that was enrolled.

    Attributes:
        name: its id, which is its identity at the broker.
        enrolled: when it was enrolled last.
        mcus: names of the microcontrollers behind it.
        revoked: when it was revoked; None while it may connect.
        certificates: all that were ever issued to it, oldest first.
        password: the broker's hash of its password.
        watcher: it is no device but a Home Assistant that reads what the hub shows it.
        party: it is no device but a party of private rounds, which reads what devices submit to them.
    """

    name: str
    enrolled: datetime
    mcus: tuple[str, ...] = ()
    revoked: datetime | None = None
    certificates: tuple[Certificate, ...] = ()
    password: str | None = None
    watcher: bool = False
    party: bool = False

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return "a Home Assistant" if self.watcher else "a party of private rounds" if self.party else "a device"


class Registry(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file.

    Attributes:
        fleet: id of the fleet.
        hosts: names and addresses of the broker; clients are told the first.
        port: TCP port for the devices.
        hub_port: TCP port for the hub.
        user: account that the broker runs as.
        passwords: devices are known by password, not by certificate.
        authority_expires: when the authority's certificate ends.
        broker_expires: when the broker's certificate ends.
        hub_expires: when the hub's certificate ends.
        devices: by name.
        version: of this format.
    """

    fleet: str
    hosts: Annotated[tuple[str, ...], Meta(min_length=1)]
    port: int
    hub_port: int
    user: str
    passwords: bool
    authority_expires: datetime
    broker_expires: datetime
    hub_expires: datetime
    devices: dict[str, Device] = {}
    version: Literal[1] = 1

    @property
    def active(self) -> Mapping[str, Device]:
        """The devices that may connect."""
        return {name: device for name, device in self.devices.items() if device.revoked is None}

    @property
    def revoked_serials(self) -> dict[str, datetime]:
        """Serial numbers of revoked certificates, with the time."""
        issued = (one for device in self.devices.values() for one in device.certificates)
        return {one.serial: one.revoked for one in issued if one.revoked is not None}


def ending(registry: Registry, by: datetime) -> dict[str, datetime]:
    """The certificates in use that end before a time, and when, the next to end first."""
    ends = {
        "the authority": registry.authority_expires,
        "the broker": registry.broker_expires,
        "the hub": registry.hub_expires,
        **{name: one.certificates[-1].expires for name, one in registry.active.items() if one.certificates},
    }
    return {name: end for name, end in sorted(ends.items(), key=lambda item: item[1]) if end < by}


def check_names(device: str, mcus: Sequence[str]) -> None:
    """Raise ConfigError unless these are a device's id and names of microcontrollers behind it."""
    if "~" in topics.check_device(device):
        gateway, _, mcu = device.partition("~")
        raise ConfigError(
            f"device id {device!r}",
            got="a microcontroller, which connects through its gateway",
            do=f"enrol the gateway: edgeguard hub enroll {gateway} --gateway-for {mcu}",
        )
    for mcu in mcus:
        if "~" in mcu:
            raise ConfigError(f"microcontroller {mcu!r}", expected="its own name, without the gateway's")
        topics.check_device(f"{device}~{mcu}")


def with_device(
    registry: Registry,
    name: str,
    *,
    mcus: Sequence[str],
    now: datetime,
    certificate: Certificate | None = None,
    password: str | None = None,
    watcher: bool = False,
    party: bool = False,
) -> Registry:
    """The registry after a device got new credentials; earlier microcontrollers of an active device are kept.

    Args:
        registry: as it is.
        name: the device.
        mcus: microcontrollers behind it.
        now: the time.
        certificate: its new certificate, or
        password: the broker's hash of its new password.
        watcher: it is a Home Assistant.
        party: it is a party of private rounds.
    """
    before = registry.devices.get(name)
    kept = before.mcus if before and before.revoked is None else ()
    issued = before.certificates if before else ()
    device = Device(
        name=name,
        enrolled=now,
        mcus=tuple(dict.fromkeys((*kept, *mcus))),
        certificates=(*issued, certificate) if certificate else issued,
        password=password,
        watcher=watcher,
        party=party,
    )
    return _with(registry, device)


def with_mcus(registry: Registry, name: str, mcus: Sequence[str]) -> Registry:
    """The registry after more microcontrollers were put behind an enrolled device."""
    device = registry.devices[name]
    return _with(registry, msgspec.structs.replace(device, mcus=tuple(dict.fromkeys((*device.mcus, *mcus)))))


def without_device(registry: Registry, name: str, *, now: datetime) -> Registry:
    """The registry after a device was revoked with all its certificates. Unchanged if it was revoked before.

    Raises:
        ConfigError: it was never enrolled.
    """
    device = registry.devices.get(name)
    if device is None:
        raise ConfigError(f"device {name!r}", got="a device that was never enrolled", do="check its name")
    if device.revoked is not None:
        return registry
    certificates = tuple(msgspec.structs.replace(one, revoked=one.revoked or now) for one in device.certificates)
    gone = msgspec.structs.replace(device, revoked=now, certificates=certificates, password=None, mcus=())
    return _with(registry, gone)


def encode(registry: Registry) -> bytes:
    """The file's content."""
    return msgspec.json.format(msgspec.json.encode(registry), indent=1) + b"\n"


def decode(content: bytes, name: str) -> Registry:
    """A registry from a file's content. Raises ConfigError, which calls the file ``name``."""
    try:
        return msgspec.json.decode(content, type=Registry)
    except msgspec.DecodeError as error:
        raise ConfigError(name, got=error, expected="what edgeguard hub init wrote", do="restore a backup") from error


def _with(registry: Registry, device: Device) -> Registry:
    devices = {**registry.devices, device.name: device}
    return msgspec.structs.replace(registry, devices=dict(sorted(devices.items())))
