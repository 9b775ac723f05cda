"""The configuration files that come with a set-up: the hub's, and one for each device.

Rules enforced here:

* what is written passes the daemon's own check as it stands; paths count from the file's own folder;
* values are written as JSON strings, which TOML reads the same where nothing but control characters is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence


def hub(*, fleet: str, host: str, port: int, group: str) -> str:
    """The content of ``hub.toml``.

    Args:
        fleet: id of the fleet.
        host: name or address of the broker.
        port: the broker's port for the hub.
        group: name of the workers' shared subscription, long and random; see :mod:`edgeguard.hub.setup.mosquitto`.
    """
    return f"""\
# Written by `edgeguard hub init`; yours to change. Every key: edgeguard config explain hub
# Run it: edgeguard hub --config hub.toml

fleet = {_string(fleet)}
# Database, cases and lock. The account that the hub runs as must be able to write to it and to read hub/key.pem.
state_dir = "state"
# Each hub needs one of its own: a second one "Hub-2". With a capital letter it is no device's.
client_id = "Hub-1"

[broker]
host = {_string(host)}
# The broker's port for the hub. Devices have another one.
port = {port}
ca = "hub/ca.pem"
certificate = "hub/certificate.pem"
key = "hub/key.pem"

[ingest]
# Processes that take reports; with 0 the hub's own one does. Several share one subscription.
workers = 0
# Its name. A device that knew it could take reports of others away from the hub: keep it secret.
group = {_string(group)}

# Where the hub answers HTTP. Only this machine reaches 127.0.0.1.
[web]
host = "127.0.0.1"
port = 8080

# More than one hub, or a large fleet: PostgreSQL.
#[store]
#url = "postgresql+psycopg://edgeguard@db.example/edgeguard"

# A model that the hub may inspect and repair; one section for each.
#[[models]]
#name = "signs"
#guarded = "signs.guarded.tflite"
#keras = "signs.keras"
#data = "clean.npz"
"""


def agent(
    *, fleet: str, device: str, host: str, port: int, passwords: bool, model: str | None, mcus: Sequence[str]
) -> str:
    """The content of a device's ``agent.toml``.

    Args:
        fleet: id of the fleet.
        device: id of the device.
        host: name or address of the broker.
        port: the broker's port for the devices.
        passwords: the device is known by password, not by certificate.
        model: name of the model file that lies beside; None where the operator brings one.
        mcus: microcontrollers that it may speak for.
    """
    if passwords:
        identity = f'username = {_string(device)}\npassword_file = "password"\n'
    else:
        identity = 'certificate = "certificate.pem"\nkey = "key.pem"\n'
    put = "" if model else "# Put the guarded model beside this file, with its sidecar NAME.guard.npz.\n"
    behind = f"# The broker lets it speak for the microcontrollers {', '.join(mcus)}.\n" if mcus else ""
    return f"""\
# Written by `edgeguard hub enroll`; yours to change. Every key: edgeguard config explain agent
# On the board: copy all of this folder to /etc/edgeguard, then sudo edgeguard service install

fleet = {_string(fleet)}
{behind}device = {_string(device)}
{put}model = {_string(model or "model.guarded.tflite")}
state_dir = "/var/lib/edgeguard"

[broker]
host = {_string(host)}
port = {port}
ca = "ca.pem"
{identity}
# Programs on this board: frames over a Unix socket. Other sources: docs/devices.md
[sources.socket]
"""


def _string(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
