"""A fleet's set-up on disk: made once, and changed by enrolling and revoking devices.

::

    FOLDER/hub.toml        the hub's configuration
    FOLDER/registry.json   what was set up and who was enrolled
    FOLDER/authority/      the authority's certificate and private key
    FOLDER/hub/            what the hub shows the broker
    FOLDER/mosquitto.conf  the broker's configuration
    FOLDER/broker/         all else that mosquitto reads, and data/ that it writes
    FOLDER/devices/NAME/   what is copied to a board, and then need not stay here

Rules enforced here:

* a set-up is there whole or not at all, and is never overwritten; of its parts only what ``renew`` names is;
* the registry is written first, once all that a command reads was found: the broker's files follow from it, and each
  command writes them anew, so that one that was cut short is completed by the next;
* no certificate leaves that the registry does not know: it could not be revoked;
* the broker's account has ``broker/`` and nothing else: whoever breaks into a broker cannot enrol, nor change the
  configuration that root starts mosquitto with;
* the same command again changes nothing.
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec

from edgeguard import disk
from edgeguard.contract import topics
from edgeguard.detection import sidecar
from edgeguard.errors import ConfigError
from edgeguard.hub.setup import files, mosquitto, pki, registry, tomls
from edgeguard.hub.setup.files import PUBLIC, SECRET
from edgeguard.hub.setup.registry import Certificate, Registry

PORT = 8883
HUB_PORT = 8884
USER = "mosquitto"

_REGISTRY = "registry.json"
_ACCOUNT = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a command did.

    Attributes:
        did: what happened to the device.
        registry: as it is now.
        folder: what is to be copied to the board; None where nothing new is.
        reload: the broker must read its files again before this holds.
    """

    did: Literal["enrolled", "renewed", "extended", "revoked", "nothing"]
    registry: Registry
    folder: Path | None = None
    reload: bool = False


def create(
    folder: Path,
    *,
    fleet: str,
    hosts: Sequence[str],
    now: datetime,
    port: int = PORT,
    hub_port: int = HUB_PORT,
    user: str = USER,
    passwords: bool = False,
    days: int = pki.DAYS,
) -> Registry:
    """Set a fleet up.

    Args:
        folder: where; it must not be there, or be empty.
        fleet: id of the fleet.
        hosts: names and addresses under which devices and hub reach the broker; the first goes into their files.
        now: the time.
        port: the broker's TCP port for the devices.
        hub_port: its port for the hub.
        user: the account that mosquitto runs as. As root, and where there is this account, the files are given to it.
        passwords: devices shall be known by password, not by certificate.
        days: validity of the certificates, but for the authority's.

    Raises:
        ConfigError: a name, host or port that is none, or something is there already.
        OSError: the disk cannot be written.
    """
    topics.check_fleet(fleet)
    folder = folder.resolve()
    if not hosts:
        raise ConfigError("host", got="none", expected="a name or address of the broker", do="give --host")
    names = tuple(dict.fromkeys(map(pki.check_host, hosts)))
    if port == hub_port:
        raise ConfigError("port", got=f"{port} for devices and hub", expected="two ports", do="choose another one")
    if not _ACCOUNT.fullmatch(user):
        raise ConfigError(f"user {user!r}", expected="the name of an account", do="correct it")
    if not str(folder).isprintable():
        raise ConfigError(f"folder {str(folder)!r}", expected="a name that can stand in a configuration file")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"folder {folder}", got="something is there already", do="choose a new folder")
    authority = pki.authority(fleet, now=now)
    broker = pki.server(authority, names, now=now, days=days)
    hub = pki.hub(mosquitto.HUB, now=now, days=days)
    made = Registry(
        fleet=fleet,
        hosts=names,
        port=port,
        hub_port=hub_port,
        user=user,
        passwords=passwords,
        authority_expires=authority.expires,
        broker_expires=broker.expires,
        hub_expires=hub.expires,
    )
    with disk.new_folder(folder, mode=0o755) as new:
        for name in ("authority", "hub", "broker", "broker/data", "devices"):
            files.folder(new / name)
        _write_pair(new / "authority", authority)
        _give_to(new / "broker", user)
        _write_broker(new, authority, broker, hub)
        layout = mosquitto.Broker(
            folder=folder / "broker", port=port, hub_port=hub_port, user=user, passwords=passwords
        )
        files.write(new / "mosquitto.conf", mosquitto.configuration(layout).encode())
        text = tomls.hub(fleet=fleet, host=names[0], port=hub_port, group=f"hub-{secrets.token_hex(16)}")
        files.write(new / "hub.toml", text.encode(), mode=SECRET)
        _write_lists(new, made, authority, now=now)
        files.write(new / _REGISTRY, registry.encode(made), mode=SECRET)
    return made


def is_there(folder: Path) -> bool:
    """Whether there is a set-up in a folder."""
    return (folder / _REGISTRY).is_file()


def load(folder: Path) -> Registry:
    """What was set up in a folder. Raises ConfigError if nothing was, or it cannot be read."""
    path = folder / _REGISTRY
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"set-up {folder}", got=f"{path.name}: {error.strerror}", do="name the folder that edgeguard hub init made"
        ) from error
    return registry.decode(content, str(path))


def renew(folder: Path, *, now: datetime, days: int = pki.DAYS) -> Registry:
    """Give broker and hub new certificates; no device has to be told. They hold when both were restarted.

    mosquitto reads its own certificate again on SIGHUP, but not the one that it trusts where the hub connects.

    Raises:
        ConfigError: there is no set-up.
        OSError: the disk cannot be written.
    """
    with files.lock(_existing(folder) / ".lock"):
        before, authority = load(folder), _authority(folder)
        broker = pki.server(authority, before.hosts, now=now, days=days)
        hub = pki.hub(mosquitto.HUB, now=now, days=days)
        after = msgspec.structs.replace(before, broker_expires=broker.expires, hub_expires=hub.expires)
        files.write(folder / _REGISTRY, registry.encode(after), mode=SECRET)
        _write_broker(folder, authority, broker, hub)
        _write_lists(folder, after, authority, now=now)
    return after


def enroll(
    folder: Path,
    device: str,
    *,
    now: datetime,
    mcus: Sequence[str] = (),
    model: Path | None = None,
    again: bool = False,
    watcher: bool = False,
    party: bool = False,
    days: int = pki.DAYS,
) -> Change:
    """Make a device's credentials and configuration, and let the broker know it.

    A device that is enrolled already keeps what it has; microcontrollers that are new are added.

    Args:
        folder: the set-up.
        device: its id.
        now: the time.
        mcus: microcontrollers that it may speak for as ``<device>~<mcu>``.
        model: guarded model to put beside the configuration, with its sidecar where there is one.
        again: make new credentials although it has some. An earlier certificate stays valid until it expires or the
            device is revoked; an earlier password does not.
        watcher: it is no device but a Home Assistant, which gets credentials alone.
        party: it is no device but a party of private rounds.
        days: validity of the certificate.

    Raises:
        ConfigError: there is no set-up, a name is none or that of something else, or there is no such model.
        OSError: the disk cannot be written.
    """
    registry.check_names(device, mcus)
    if party and (watcher or mcus):
        raise ConfigError(f"enrolment of {device}", got="a party that is something else too", do="choose one")
    if model is not None and (model.suffix != ".tflite" or not model.is_file()):
        raise ConfigError(f"model {model}", expected="a .tflite file", do="check the path")
    with files.lock(_existing(folder) / ".lock"):
        before, authority = load(folder), _authority(folder)
        known = before.active.get(device)
        if known is not None and (known.watcher, known.party) != (watcher, party):
            raise ConfigError(f"enrolment of {device}", got=f"{known.kind} of this name", do="choose another name")
        if known is not None and not again:
            after = registry.with_mcus(before, device, mcus)
            changed = _save(folder, before, after, authority, now=now)
            return Change(did="extended" if after != before else "nothing", registry=after, reload=changed)
        contents = {"ca.pem": (authority.certificate, PUBLIC)}
        if model is not None:
            found = (path for path in (model, sidecar.path_beside(model)) if path.is_file())
            contents |= {path.name: (path.read_bytes(), PUBLIC) for path in found}
        if before.passwords:
            password = secrets.token_urlsafe(24)
            stored = mosquitto.password_hash(password, secrets.token_bytes(mosquitto.SALT_BYTES))
            contents["password"] = (f"{password}\n".encode(), SECRET)
            after = registry.with_device(
                before, device, mcus=mcus, now=now, password=stored, watcher=watcher, party=party
            )
        else:
            made = pki.device(authority, device, now=now, days=days)
            contents["certificate.pem"] = (made.certificate, PUBLIC)
            contents["key.pem"] = (made.key, SECRET)
            issued = Certificate(serial=made.serial, expires=made.expires)
            after = registry.with_device(
                before, device, mcus=mcus, now=now, certificate=issued, watcher=watcher, party=party
            )
        text = tomls.agent(
            fleet=after.fleet,
            device=device,
            host=after.hosts[0],
            port=after.port,
            passwords=after.passwords,
            model=model.name if model else None,
            mcus=after.devices[device].mcus,
        )
        if not watcher:
            contents["agent.toml"] = (text.encode(), PUBLIC)
        changed = _save(folder, before, after, authority, now=now)
        shutil.rmtree(folder / "devices" / device, ignore_errors=True)
        # devices/ is closed to others. What is copied from it must be open to the agent's account, but for the secrets.
        with disk.new_folder(folder / "devices" / device, mode=0o755) as new:
            for name, (content, mode) in contents.items():
                files.write(new / name, content, mode=mode)
    return Change(
        did="renewed" if known else "enrolled",
        registry=after,
        folder=folder / "devices" / device,
        reload=changed,
    )


def revoke(folder: Path, device: str, *, now: datetime) -> Change:
    """Take a device's rights and credentials away for good; it may be enrolled again.

    Raises:
        ConfigError: there is no set-up, or the device was never enrolled.
        OSError: the disk cannot be written.
    """
    with files.lock(_existing(folder) / ".lock"):
        before, authority = load(folder), _authority(folder)
        after = registry.without_device(before, device, now=now)
        changed = _save(folder, before, after, authority, now=now)
        shutil.rmtree(folder / "devices" / device, ignore_errors=True)
    return Change(did="revoked" if after != before else "nothing", registry=after, reload=changed)


def _save(folder: Path, before: Registry, after: Registry, authority: pki.Credentials, *, now: datetime) -> bool:
    """Write the registry, then what follows from it. Returns whether the broker's files say something new."""
    if after != before:
        files.write(folder / _REGISTRY, registry.encode(after), mode=SECRET)
    return _write_lists(folder, after, authority, now=now)


def _write_lists(folder: Path, state: Registry, authority: pki.Credentials, *, now: datetime) -> bool:
    """Write what the broker knows devices by: access rules, and passwords or revoked certificates."""
    broker = folder / "broker"
    gateways = {name: device.mcus for name, device in state.active.items() if device.mcus}
    watchers = [name for name, one in state.active.items() if one.watcher]
    parties = [name for name, one in state.active.items() if one.party]
    gone = state.devices.keys() - state.active.keys()
    rules = mosquitto.access_rules(state.fleet, gateways=gateways, revoked=gone, watchers=watchers, parties=parties)
    changed = _update(broker / "acl", rules.encode())
    if state.passwords:
        hashes = {name: device.password for name, device in state.active.items() if device.password}
        return _update(broker / "passwords", mosquitto.password_file(hashes).encode()) or changed
    path = broker / "revoked.pem"
    if not path.exists() or pki.revoked_serials(path.read_bytes()) != state.revoked_serials.keys():
        files.write(path, pki.revocations(authority, state.revoked_serials, now=now), mode=SECRET)
        changed = True
    return changed


def _update(path: Path, content: bytes) -> bool:
    with suppress(FileNotFoundError):
        if path.read_bytes() == content:
            return False
    files.write(path, content, mode=SECRET)
    return True


def _write_broker(folder: Path, authority: pki.Credentials, broker: pki.Credentials, hub: pki.Credentials) -> None:
    """Write the certificates of broker and hub."""
    for where in (folder / "broker", folder / "hub"):
        files.write(where / "ca.pem", authority.certificate)
    files.write(folder / "broker" / "server.pem", broker.certificate)
    files.write(folder / "broker" / "server.key", broker.key, mode=SECRET)
    files.write(folder / "broker" / "hub.pem", hub.certificate)
    _write_pair(folder / "hub", hub)


def _write_pair(folder: Path, pair: pki.Credentials) -> None:
    files.write(folder / "certificate.pem", pair.certificate)
    files.write(folder / "key.pem", pair.key, mode=SECRET)


def _authority(folder: Path) -> pki.Credentials:
    path = folder / "authority"
    try:
        return pki.load((path / "certificate.pem").read_bytes(), (path / "key.pem").read_bytes())
    except OSError as error:
        raise ConfigError(
            f"authority {path}", got=error.strerror, do="run this where the authority's key is"
        ) from error


def _existing(folder: Path) -> Path:
    load(folder)
    if not (folder / "broker").is_dir():
        raise ConfigError(
            f"set-up {folder}", got="no folder broker/", do="run it where it is and copy it to the broker afterwards"
        )
    return folder


def _give_to(folder: Path, user: str) -> None:
    """Give a folder and what is in it to an account, where that can be done and there is one."""
    if os.geteuid() != 0:
        return
    with suppress(KeyError):
        account = pwd.getpwnam(user)
        for path in (folder, *folder.iterdir()):
            os.chown(path, account.pw_uid, account.pw_gid)
