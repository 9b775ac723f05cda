"""Writes the configuration of a small fleet: the hub's, each agent's, and the signed repository between them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from edgeguard.release.repository import Repository

VETO_S = 8.0
"""Time between release and roll-out in which an operator may object. The demo's attacker uses it."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Where everything of the fleet lies."""

    name: str
    folder: Path
    hub_config: Path
    web_port: int
    agents: Mapping[str, Path]

    @property
    def hub_database(self) -> Path:
        """The hub's SQLite file."""
        return self.folder / "hub" / "hub.db"

    @property
    def targets(self) -> Path:
        """The served folder of released models."""
        return self.folder / "release" / "targets"

    def inbox(self, device: str) -> Path:
        """The source folder of a device."""
        return self.folder / device / "inbox"

    def spool(self, device: str) -> Path:
        """The spool of a device."""
        return self.folder / device / "state" / "spool.sqlite"


def write(folder: Path, *, fleet: str, model: str, devices: int, broker: tuple[str, int], web_port: int) -> Fleet:
    """Make repository, folders and configuration files. The models and data must be put beside them:
    ``model.tflite``, ``model.keras`` and ``owner.npz`` in ``folder``.

    Args:
        folder: where everything goes.
        fleet: id of the fleet, one per run: retained messages of an earlier run on the same broker then say nothing.
        model: what to call the model.
        devices: how many agents.
        broker: host and port.
        web_port: the hub's.
    """
    repository = Repository.create(
        folder / "release", folder / "keys", folder / "offline", clock=lambda: datetime.now(timezone.utc)
    )
    (folder / "root.json").write_bytes(repository.root())
    agents = {}
    for number in range(1, devices + 1):
        device = f"device-{number}"
        (folder / device / "inbox").mkdir(parents=True)
        agents[device] = folder / device / "agent.toml"
        agents[device].write_text(_agent_toml(fleet, device, broker, web_port))
    hub_config = folder / "hub.toml"
    model = re.sub("[^a-z0-9]+", "-", model.lower()).strip("-")[:40] or "model"
    hub_config.write_text(_hub_toml(fleet, model, broker, web_port))
    return Fleet(name=fleet, folder=folder, hub_config=hub_config, web_port=web_port, agents=agents)


def _agent_toml(fleet: str, device: str, broker: tuple[str, int], web_port: int) -> str:
    return f"""\
fleet = "{fleet}"
device = "{device}"
model = "../model.tflite"
state_dir = "state"
linger_s = 30.0

[broker]
host = "{broker[0]}"
port = {broker[1]}

[sources.folder]
path = "inbox"
stop_at_end = true

[window]
inputs = 64
seconds = 3.0

[update]
metadata_url = "http://127.0.0.1:{web_port}/metadata/"
targets_url = "http://127.0.0.1:{web_port}/targets/"
root = "../root.json"
retry_s = {2 * VETO_S}
"""


def _hub_toml(fleet: str, model: str, broker: tuple[str, int], web_port: int) -> str:
    return f"""\
fleet = "{fleet}"
client_id = "{fleet}-hub"
state_dir = "hub"

[broker]
host = "{broker[0]}"
port = {broker[1]}

[web]
port = {web_port}
anonymous = "viewer"

[release]
folder = "release"
keys = "keys"

[policy]
veto_s = {VETO_S}
assess_s = 1.0

[policy.steps]
# Small data sets have fewer held-out inputs of a class than the gate can check: this fleet's owner accepts that.
unchecked = "auto"

[rollout]
soak_s = 0
min_inputs = 0

[[models]]
name = "{model}"
guarded = "model.tflite"
keras = "model.keras"
data = "owner.npz"
"""
