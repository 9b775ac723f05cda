"""The agent's configuration: one TOML file into frozen values, or one clear line on what is wrong with it.

The rules that both daemons' configurations follow stand in :mod:`edgeguard.settings`.

Example:
    fleet = "demo"
    device = "camera-1"
    model = "model.tflite"
    state_dir = "state"

    [broker]
    host = "127.0.0.1"

    [source]
    path = "inbox"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from edgeguard import settings
from edgeguard.contract import topics
from edgeguard.release.client import MAX_MODEL_BYTES, Url
from edgeguard.settings import BrokerConfig, Section

Seconds = Annotated[float, Meta(gt=0, le=86400)]


class SourceConfig(Section, frozen=True, kw_only=True):
    """``[source]``: where the inputs come from.

    Attributes:
        kind: ``folder``: batches ``[n, ...]`` in ``*.npy`` files, dropped in by renaming.
        path: the folder. Its files are deleted once they are counted.
        stop_at_end: stop when a file named ``end`` is there and every batch was taken; else run for ever.
    """

    kind: Literal["folder"] = "folder"
    path: Path
    stop_at_end: bool = False


class WindowConfig(Section, frozen=True, kw_only=True):
    """``[window]``: how many inputs go into one report.

    Attributes:
        inputs: a window closes at the end of the batch that reaches this many.
        seconds: or at the end of the first batch after this long.
    """

    inputs: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    seconds: Seconds = 10.0


class AlertsConfig(Section, frozen=True, kw_only=True):
    """``[alerts]``: flagged inputs that are told at once.

    Attributes:
        per_minute: at most this many; the others are counted in the window's report only. 0 sends none.
    """

    per_minute: Annotated[int, Meta(ge=0, le=6000)] = 6


class UpdateConfig(Section, frozen=True, kw_only=True):
    """``[update]``: signed models. Without this section the agent keeps the model it has.

    Attributes:
        metadata_url: where the signed metadata is served.
        targets_url: where the models are served.
        root: file with the trusted root metadata, brought to the device by a safe way.
        max_mib: a larger model is refused.
        timeout_s: seconds for one attempt.
        retry_s: wait after a first failure; it doubles up to 32 times this.
    """

    metadata_url: Url
    targets_url: Url
    root: Path
    max_mib: Annotated[int, Meta(ge=1, le=MAX_MODEL_BYTES >> 20)] = 64
    timeout_s: Seconds = 120.0
    retry_s: Seconds = 5.0


class SpoolConfig(Section, frozen=True, kw_only=True):
    """``[spool]``: reports that wait for the hub.

    Attributes:
        max_mib: beyond this the oldest are dropped, and counted.
        resend_s: without an ack for so long everything is sent again; it doubles up to 12 times this.
    """

    max_mib: Annotated[int, Meta(ge=1, le=65536)] = 64
    resend_s: Seconds = 5.0


class RuntimeConfig(Section, frozen=True, kw_only=True):
    """``[runtime]``: what runs the model.

    Attributes:
        threads: threads of the runtime.
        name: one of the runtimes for devices; else the first one installed.
    """

    threads: Annotated[int, Meta(ge=1, le=64)] = 1
    name: Literal["litert", "tflite-runtime"] | None = None


class ResultsConfig(Section, frozen=True, kw_only=True):
    """``[results]``: a file with one line of JSON per counted input, for people and tests.

    Attributes:
        path: the file; lines are appended when their window is spooled.
    """

    path: Path


class AgentConfig(Section, frozen=True, kw_only=True):
    """The whole file.

    Attributes:
        fleet: id of the fleet.
        device: id of this device within it.
        model: the first model; it is copied into the state folder once, and releases replace that copy.
        sequence: the release number of that first model; 0 for one that was never released.
        state_dir: folder that belongs to this agent alone: spool, model slots, update metadata.
        linger_s: on stopping, how long to wait for the hub to acknowledge what is left.
        health_s: seconds between two health messages.
    """

    fleet: str
    device: str
    model: Path
    state_dir: Path
    broker: BrokerConfig
    source: SourceConfig
    sequence: Annotated[int, Meta(ge=0, le=2**53)] = 0
    window: WindowConfig = WindowConfig()
    alerts: AlertsConfig = AlertsConfig()
    update: UpdateConfig | None = None
    spool: SpoolConfig = SpoolConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    results: ResultsConfig | None = None
    linger_s: Annotated[float, Meta(ge=0, le=3600)] = 5.0
    health_s: Seconds = 30.0


def load(path: Path) -> AgentConfig:
    """Read and check a configuration file.

    Raises:
        ConfigError: it cannot be read, is not TOML, has an unknown or missing key or a value out of range.
    """
    return parse(settings.read_toml(path), base=path.parent, name=str(path))


def parse(raw: dict[str, Any], *, base: Path, name: str = "configuration") -> AgentConfig:
    """Check the content of a configuration file.

    Args:
        raw: the TOML document.
        base: folder that relative paths count from.
        name: what to call the file in an error.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, a value out of range, an id that is not valid.
    """
    config = settings.convert(raw, AgentConfig, base=base, name=name)
    topics.check_fleet(config.fleet)
    topics.check_device(config.device)
    settings.check_broker(config.broker, name)
    return config
