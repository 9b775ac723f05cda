"""What mosquitto 2 reads: its configuration, its access rules and its passwords, as text.

Rules enforced here:

* two listeners. At that of the devices the client id is the identity, whatever a client calls itself, so that none can
  take over the session of another. At that of the hub, whose workers need client ids of their own, one certificate is
  trusted and nobody else's: no device can come in there;
* a device writes and reads under its own identity only (``pattern`` rules); a gateway also under the ids of the
  microcontrollers that it was enrolled with; a device that was revoked loses what the patterns give, even if it stays
  connected; nobody is anonymous, and there is no other rule;
* mosquitto's access file decides on what is published and delivered, not on who subscribes: whoever joins a shared
  subscription takes a part of its messages away, even if they are not delivered to it. So the name of the one that the
  hub's workers share is long and random, and known to the hub alone;
* queues are bounded in messages and bytes: what does not fit is dropped, and devices send it again until the hub's ack.

mosquitto.conf(5) and mosquitto_passwd(1) describe the formats.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeguard.contract import topics
from edgeguard.contract.messages import MAX_PAYLOAD

HUB = "_hub"
"""The hub's identity. No device can have it, for an id begins with a letter or a digit."""
HOME_ASSISTANT = "homeassistant"
"""Home Assistant's own discovery prefix."""
MAX_INFLIGHT = 4096
MAX_INFLIGHT_BYTES = 64 << 20
MAX_QUEUED_MESSAGES = 100_000
MAX_QUEUED_BYTES = 256 << 20
MAX_PACKET = MAX_PAYLOAD + (128 << 10)
"""The largest payload, the longest topic of MQTT, and a header."""

ITERATIONS = 101
"""mosquitto_passwd's own number. The passwords are random: more would only cost the broker time at each connection."""
SALT_BYTES = 12

_DEVICE_WRITES = (*topics.DEVICE_CHANNELS, topics.reply("+"))
_SEALED = topics.PRIVATE
"""For the parties of private rounds alone, for whom they are sealed."""
_DEVICE_READS = (topics.command("+"), topics.ACK, topics.MODEL_DESIRED)


@dataclass(frozen=True, kw_only=True)
class Broker:
    """What the configuration says.

    Attributes:
        folder: absolute path of the folder with the broker's files, which its account owns. The configuration lies
            beside it: root starts mosquitto with that, so the account must not be able to change it.
        port: TCP port for the devices.
        hub_port: TCP port for the hub.
        user: account that mosquitto changes to when root starts it.
        passwords: devices are known by password, not by certificate.
    """

    folder: Path
    port: int
    hub_port: int
    user: str
    passwords: bool


def configuration(broker: Broker) -> str:
    """The content of ``mosquitto.conf``."""
    folder = broker.folder
    tls = f"certfile {folder}/server.pem\nkeyfile {folder}/server.key\ntls_version tlsv1.2\n"
    if broker.passwords:
        by_password, identity = f"password_file {folder}/passwords\n", ""
    else:
        by_password = ""
        identity = (
            f"cafile {folder}/ca.pem\n"
            "# Read again on SIGHUP, as the certificates are.\n"
            f"crlfile {folder}/revoked.pem\n"
            "require_certificate true\n"
            "use_identity_as_username true\n"
        )
    return f"""\
# Written by `edgeguard hub init`. The files that it names are kept up to date by `edgeguard hub enroll` and `revoke`;
# this one is yours to change. Start: mosquitto -c {folder.parent}/mosquitto.conf

# The account that mosquitto changes to when root starts it. It must own {folder}, and not be able to write this file.
user {broker.user}

# Who may do what. Reloaded on SIGHUP.
per_listener_settings false
allow_anonymous false
acl_file {folder}/acl
{by_password}
# What waits while a client is away is on disk, and bounded. Devices send again what the hub did not acknowledge.
persistence true
persistence_location {folder}/data/
autosave_interval 60
persistent_client_expiration 30d
# Unacknowledged messages that a client is sent at once: the hub commits in batches of what is under way.
max_inflight_messages {MAX_INFLIGHT}
max_inflight_bytes {MAX_INFLIGHT_BYTES}
# Queued messages, and bytes, for each client.
max_queued_messages {MAX_QUEUED_MESSAGES}
max_queued_bytes {MAX_QUEUED_BYTES}
max_packet_size {MAX_PACKET}

log_dest stderr

# Devices. The client id is the identity: no device can take over the session of another.
listener {broker.port}
{tls}{identity}use_username_as_clientid true

# The hub, known by this one certificate; its workers choose their client ids.
listener {broker.hub_port}
{tls}cafile {folder}/hub.pem
require_certificate true
use_identity_as_username true
"""


def access_rules(
    fleet: str,
    *,
    gateways: Mapping[str, Sequence[str]],
    revoked: Iterable[str],
    watchers: Iterable[str] = (),
    parties: Iterable[str] = (),
) -> str:
    """The content of the access file.

    Args:
        fleet: id of the fleet.
        gateways: device to the microcontrollers behind it, by their own names.
        revoked: devices that shall have no rights.
        watchers: accounts of Home Assistant: they read what the hub shows it, and have no rights of a device.
        parties: of private rounds: they read what devices submit to those, and have no rights of a device.
    """
    watchers = sorted(watchers)
    prefix = f"{topics.PREFIX}/{fleet}"

    def rules(kind: str, who: str) -> list[str]:
        return [
            *(f"{kind} write {prefix}/{who}/{channel}" for channel in _DEVICE_WRITES),
            *(f"{kind} read {prefix}/{who}/{channel}" for channel in _DEVICE_READS),
            f"{kind} write {prefix}/{who}/{_SEALED}",
        ]

    lines = ["# Written by `edgeguard hub enroll` and `revoke`: changes are lost.", "", f"user {HUB}"]
    lines += [f"topic read {prefix}/+/{channel}" for channel in _DEVICE_WRITES]
    lines += [f"topic write {prefix}/+/{channel}" for channel in _DEVICE_READS]
    lines += [f"topic write {prefix}/{HUB}/#"]
    for gateway, mcus in sorted(gateways.items()):
        lines += ["", f"user {gateway}"]
        for mcu in mcus:
            lines += rules("topic", f"{gateway}~{mcu}")
    if watchers:
        lines.insert(lines.index(f"topic write {prefix}/{HUB}/#") + 1, f"topic write {HOME_ASSISTANT}/#")
    for watcher in watchers:
        lines += ["", f"user {watcher}", f"topic deny {prefix}/{watcher}/#"]
        lines += [f"topic read {prefix}/{HUB}/sensor/#", f"topic read {HOME_ASSISTANT}/#"]
    for party in sorted(parties):
        lines += ["", f"user {party}", f"topic deny {prefix}/{party}/#", f"topic read {prefix}/+/{_SEALED}"]
    for device in sorted(revoked):
        lines += ["", f"user {device}", "topic deny #"]
    # Patterns hold for every user, wherever they stand; at the end they are not read as a part of the last block.
    return "\n".join([*lines, "", *rules("pattern", "%u"), ""])


def password_hash(password: str, salt: bytes) -> str:
    """A password as mosquitto 2 stores it: PBKDF2 with SHA-512 (RFC 8018).

    Args:
        password: the password.
        salt: ``SALT_BYTES`` random bytes.
    """
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, ITERATIONS)
    return f"$7${ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def password_file(hashes: Mapping[str, str]) -> str:
    """The content of the password file, from each user's hash."""
    return "".join(f"{user}:{stored}\n" for user, stored in sorted(hashes.items()))
