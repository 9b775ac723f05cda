"""The hub's configuration: one TOML file into frozen values, or one clear line on what is wrong with it.

The rules that both daemons' configurations follow stand in :mod:`edgeguard.settings`.

Example:
    fleet = "demo"
    state_dir = "hub"

    [broker]
    host = "127.0.0.1"

    [release]
    folder = "release"
    keys = "keys"

    [[models]]
    name = "signs"
    guarded = "signs.tflite"
    keras = "signs.keras"
    data = "clean.npz"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgeguard import settings
from edgeguard.contract import topics
from edgeguard.errors import ConfigError
from edgeguard.settings import BrokerConfig, NonEmpty, Section

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Probability = Annotated[float, Meta(gt=0, lt=1)]


class StoreConfig(Section, frozen=True, kw_only=True):
    """``[store]``: the database.

    Attributes:
        url: a SQLAlchemy URL; without it, SQLite in the file ``hub.db`` of the state folder.
    """

    url: NonEmpty | None = None


class WebConfig(Section, frozen=True, kw_only=True):
    """``[web]``: the HTTP server that devices fetch releases from. It asks nobody who they are.

    Attributes:
        host: address to listen on; only this machine by default.
        port: TCP port; 0 takes a free one and says which in the log.
    """

    host: NonEmpty = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080


class ReleaseConfig(Section, frozen=True, kw_only=True):
    """``[release]``: the signed repository. Without this section repaired models are kept, not released.

    Attributes:
        folder: what is served: ``metadata`` and ``targets``.
        keys: the private keys; never inside the served folder.
        base_url: the address under which devices reach the web server, shown in its status.
    """

    folder: Path
    keys: Path
    base_url: Annotated[str, Meta(pattern="^https?://[^/ ]", max_length=2000)] | None = None


class PolicyConfig(Section, frozen=True, kw_only=True):
    """``[policy]``: when evidence is a suspicion, and how carefully a repaired model is rolled out.

    Attributes:
        alpha: a label is suspicious when a clean model would show this many flags with a smaller probability.
        device_alpha: the same for one device on its own.
        min_devices: so many devices must each show an excess; never more than run the model.
        min_flagged: fewer flagged inputs than this prove nothing.
        device_share: the largest share of the counted inputs, and of the flagged ones, that one device may bring.
        channels: how many channels a suspicion names.
        attempts: a worker that crashed this often is given up.
        worker_timeout_s: a worker that takes longer is ended, which counts as a crash.
        veto_s: seconds between release and roll-out in which an operator may object.
        canaries: devices that get a release first.
        interval_s: seconds between two looks at the evidence.
    """

    alpha: Probability = 1e-6
    device_alpha: Probability = 0.01
    min_devices: Annotated[int, Meta(ge=1)] = 2
    min_flagged: Annotated[int, Meta(ge=1)] = 20
    device_share: Annotated[float, Meta(gt=0, le=1)] = 0.5
    channels: Annotated[int, Meta(ge=1, le=4096)] = 16
    attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    worker_timeout_s: Annotated[float, Meta(gt=0)] = 7200.0
    veto_s: Annotated[float, Meta(ge=0)] = 0.0
    canaries: Annotated[int, Meta(ge=1)] = 1
    interval_s: Annotated[float, Meta(ge=0.05, le=3600)] = 1.0


class ModelConfig(Section, frozen=True, kw_only=True):
    """``[[models]]``: one model that the fleet runs.

    Attributes:
        name: what its releases are called.
        guarded: the guarded ``.tflite`` that the devices run.
        keras: the trainable model that it was converted from.
        data: clean data for inspection and repair: a name or a path.
        sequence: the release number of ``guarded``; 0 for one that was never released.
    """

    name: Name
    guarded: Path
    keras: Path
    data: NonEmpty
    sequence: Annotated[int, Meta(ge=0, le=2**53)] = 0


class HubConfig(Section, frozen=True, kw_only=True):
    """The whole file.

    Attributes:
        fleet: id of the fleet.
        state_dir: folder that belongs to this hub alone: database, cases, lock.
        client_id: the hub's MQTT client id, under which the broker keeps messages while the hub is away.
    """

    fleet: str
    state_dir: Path
    broker: BrokerConfig
    client_id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "edgeguard-hub"
    store: StoreConfig = StoreConfig()
    web: WebConfig = WebConfig()
    release: ReleaseConfig | None = None
    policy: PolicyConfig = PolicyConfig()
    models: tuple[ModelConfig, ...] = ()


def load(path: Path) -> HubConfig:
    """Read and check a configuration file.

    Raises:
        ConfigError: it cannot be read, is not TOML, has an unknown or missing key or a value out of range.
    """
    return parse(settings.read_toml(path), base=path.parent, name=str(path))


def parse(raw: dict[str, Any], *, base: Path, name: str = "configuration") -> HubConfig:
    """Check the content of a configuration file.

    Args:
        raw: the TOML document.
        base: folder that relative paths count from.
        name: what to call the file in an error.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, a value out of range, an id that is not valid.
    """
    config = settings.convert(raw, HubConfig, base=base, name=name)
    topics.check_fleet(config.fleet)
    settings.check_broker(config.broker, name)
    names = [model.name for model in config.models]
    if len(set(names)) != len(names):
        raise ConfigError(name, got="two [[models]] of one name", do="give each its own name")
    if config.release and config.release.keys.resolve().is_relative_to(config.release.folder.resolve()):
        raise ConfigError(
            name, got="release.keys inside release.folder, which is served to everyone", do="keep the keys elsewhere"
        )
    models = tuple(msgspec.structs.replace(model, data=_data(model.data, base.absolute())) for model in config.models)
    return msgspec.structs.replace(config, models=models)


def store_url(config: HubConfig) -> str:
    """Where the database is."""
    return config.store.url or f"sqlite:///{config.state_dir / 'hub.db'}"


def _data(data: str, base: Path) -> str:
    """A path where there is such a file or folder beside the configuration, else the name as it stands."""
    try:
        return str(base / data) if (base / data).exists() else data
    except (OSError, ValueError):
        return data
