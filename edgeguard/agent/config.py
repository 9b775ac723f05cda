"""The agent's configuration: one TOML file into frozen values, or one clear line on what is wrong with it.

Rules enforced here:

* an unknown key is refused by its name, so that a typing error never passes as a default;
* every number has a range;
* relative paths count from the folder of the configuration file, not from where the agent was started.

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

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgeguard.contract import topics
from edgeguard.errors import ConfigError
from edgeguard.release.client import MAX_MODEL_BYTES, Url

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_BYTES = 1 << 20

Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections: immutable, and a key that no field is named after is refused."""


class BrokerConfig(_Section, frozen=True, kw_only=True):
    """``[broker]``: the MQTT broker, any that speaks MQTT 3.1.1.

    Attributes:
        host: name or address.
        port: TCP port.
        username: user name, where the broker asks for one.
        password_file: file whose first line is the password; it never stands in the configuration itself.
        ca: PEM file of the authority that signed the broker's certificate; TLS is used when it is given.
        keepalive_s: seconds without traffic after which broker and device test each other.
    """

    host: Annotated[str, Meta(min_length=1, max_length=253)]
    port: Port = 1883
    username: Annotated[str, Meta(min_length=1)] | None = None
    password_file: Path | None = None
    ca: Path | None = None
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 30


class SourceConfig(_Section, frozen=True, kw_only=True):
    """``[source]``: where the inputs come from.

    Attributes:
        kind: ``folder``: batches ``[n, ...]`` in ``*.npy`` files, dropped in by renaming.
        path: the folder. Its files are deleted once they are counted.
        stop_at_end: stop when a file named ``end`` is there and every batch was taken; else run for ever.
    """

    kind: Literal["folder"] = "folder"
    path: Path
    stop_at_end: bool = False


class WindowConfig(_Section, frozen=True, kw_only=True):
    """``[window]``: how many inputs go into one report.

    Attributes:
        inputs: a window closes at the end of the batch that reaches this many.
        seconds: or at the end of the first batch after this long.
    """

    inputs: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    seconds: Seconds = 10.0


class AlertsConfig(_Section, frozen=True, kw_only=True):
    """``[alerts]``: flagged inputs that are told at once.

    Attributes:
        per_minute: at most this many; the others are counted in the window's report only. 0 sends none.
    """

    per_minute: Annotated[int, Meta(ge=0, le=6000)] = 6


class UpdateConfig(_Section, frozen=True, kw_only=True):
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


class SpoolConfig(_Section, frozen=True, kw_only=True):
    """``[spool]``: reports that wait for the hub.

    Attributes:
        max_mib: beyond this the oldest are dropped, and counted.
        resend_s: without an ack for so long everything is sent again; it doubles up to 12 times this.
    """

    max_mib: Annotated[int, Meta(ge=1, le=65536)] = 64
    resend_s: Seconds = 5.0


class RuntimeConfig(_Section, frozen=True, kw_only=True):
    """``[runtime]``: what runs the model.

    Attributes:
        threads: threads of the runtime.
        name: one of the runtimes for devices; else the first one installed.
    """

    threads: Annotated[int, Meta(ge=1, le=64)] = 1
    name: Literal["litert", "tflite-runtime"] | None = None


class ResultsConfig(_Section, frozen=True, kw_only=True):
    """``[results]``: a file with one line of JSON per counted input, for people and tests.

    Attributes:
        path: the file; lines are appended when their window is spooled.
    """

    path: Path


class AgentConfig(_Section, frozen=True, kw_only=True):
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
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"configuration {path}", got="more than 1 MiB", expected="a TOML file")
        raw = tomllib.loads(content.decode())
    except OSError as error:
        raise ConfigError(
            f"configuration {path}", got=error.strerror, expected="a readable TOML file", do="check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"configuration {path}", got=str(error), expected="TOML", do="correct the file") from error
    return parse(raw, base=path.parent, name=str(path))


def parse(raw: dict[str, Any], *, base: Path, name: str = "configuration") -> AgentConfig:
    """Check the content of a configuration file.

    Args:
        raw: the TOML document.
        base: folder that relative paths count from.
        name: what to call the file in an error.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, a value out of range, an id that is not valid.
    """

    def from_toml(kind: type, value: object) -> object:
        if kind is Path and isinstance(value, str) and value and "\0" not in value:
            return base.absolute() / value
        raise ValueError("Expected a path")

    try:
        config = msgspec.convert(raw, AgentConfig, dec_hook=from_toml)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(name, got=str(error), do="correct this key") from error
    topics.check_fleet(config.fleet)
    topics.check_device(config.device)
    if config.broker.password_file and not config.broker.username:
        raise ConfigError(name, got="broker.password_file without broker.username", do="give both or neither")
    return config


def password(broker: BrokerConfig) -> str | None:
    """The first line of the password file, None where none is named. Raises ConfigError if unreadable."""
    if broker.password_file is None:
        return None
    try:
        lines = broker.password_file.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"password file {broker.password_file}", got=error, expected="a text file") from error
    if not lines or not lines[0]:
        raise ConfigError(f"password file {broker.password_file}", got="nothing", expected="a password in line 1")
    return lines[0]
