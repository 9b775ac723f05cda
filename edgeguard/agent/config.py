"""The agent's configuration: one TOML file into frozen values, or one clear line on what is wrong with it.

The rules that both daemons' configurations follow stand in :mod:`edgeguard.settings`.

Example:
    fleet = "demo"
    device = "camera-1"
    model = "model.tflite"
    state_dir = "state"

    [broker]
    host = "127.0.0.1"

    [sources.folder]
    path = "inbox"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from edgeguard import settings
from edgeguard.contract import topics
from edgeguard.errors import ConfigError
from edgeguard.release.client import MAX_MODEL_BYTES, Url
from edgeguard.settings import BrokerConfig, NonEmpty, Port, Section

Seconds = Annotated[float, Meta(gt=0, le=86400)]


class FolderConfig(Section, frozen=True, kw_only=True):
    """``[sources.folder]``: batches ``[n, ...]`` in ``*.npy`` files and images, dropped in by renaming.

    Attributes:
        path: the folder.
        keep: counted files are moved to ``done/`` in the folder; else they are deleted.
        stop_at_end: stop when a file named ``end`` is there and every file was taken; else run for ever.
    """

    path: Path
    keep: bool = False
    stop_at_end: bool = False


class SocketConfig(Section, frozen=True, kw_only=True):
    """``[sources.socket]``: a Unix socket for programs on this device, ``edgeguard.Interpreter`` among them.

    Attributes:
        path: the socket; its mode is 0660, its group ``edgeguard`` where there is one.
    """

    path: Path = Path("/run/edgeguard/agent.sock")


class StdinConfig(Section, frozen=True, kw_only=True):
    """``[sources.stdin]``: frames on standard input; the agent stops at its end where it has no other source."""


class TopicConfig(Section, frozen=True, kw_only=True):
    """``[sources.mqtt]``: an MQTT topic: one JPEG, PNG or frame a message.

    Attributes:
        topic: the topic or filter.
        host: another broker, without accounts, as on the device itself; without it, that in ``[broker]``. One that
            ``edgeguard hub init`` set up lets a device read nothing but what the hub says to it.
        port: TCP port of that broker.
    """

    topic: NonEmpty
    host: Annotated[str, Meta(min_length=1, max_length=253)] | None = None
    port: Port = 1883


class CameraConfig(Section, frozen=True, kw_only=True):
    """``[sources.camera]``: a camera through OpenCV (``pip install 'edgeguard[camera]'``).

    Attributes:
        device: number of the device, or a file or URL, as OpenCV takes it.
        per_second: at most so many frames of a live camera are run; all that come where it is not given.
    """

    device: Annotated[int, Meta(ge=0, le=255)] | NonEmpty = 0
    per_second: Annotated[float, Meta(gt=0, le=1000)] | None = None


class SerialConfig(Section, frozen=True, kw_only=True):
    """``[[sources.serial]]``: a microcontroller on a serial port (``pip install 'edgeguard[serial]'``).

    It runs its model itself and speaks through this device: at the hub it is the device ``<this device>~<name>``.
    `edgeguard hub enroll GATEWAY --gateway-for NAME` lets the broker take that.

    Attributes:
        name: of the microcontroller, behind the ``~``.
        port: the port; a name that udev gives, as in ``/dev/serial/by-id``, stays with the board.
        baud: bits per second, as the firmware has it.
        model: the guarded file that the firmware was built with, its sidecar beside it. Releases are checked against
            what runs, so without it the microcontroller takes none.
    """

    name: str
    port: Path
    baud: Annotated[int, Meta(ge=300, le=4_000_000)] = 115_200
    model: Path | None = None


class SourcesConfig(Section, frozen=True, kw_only=True):
    """``[sources]``: where the inputs come from. At least one.

    Attributes:
        folder: a folder of files.
        socket: programs on this device.
        stdin: standard input.
        mqtt: an MQTT topic.
        camera: a camera.
        serial: microcontrollers, which bring reports instead of inputs.
    """

    folder: FolderConfig | None = None
    socket: SocketConfig | None = None
    stdin: StdinConfig | None = None
    mqtt: TopicConfig | None = None
    camera: CameraConfig | None = None
    serial: tuple[SerialConfig, ...] = ()


class BudgetConfig(Section, frozen=True, kw_only=True):
    """``[budget]``: what the guard may take beside the model itself. Where it takes more, it does less, and says so.

    Attributes:
        inferences_per_second: extra inferences that looks at doubtful inputs may take, per second.
        burst: extra inferences that may be taken at once.
        audit_share: share of unsuspicious inputs that are looked at too.
        cpu_share: share of one processor core that the guard's own work may take.
        memory_mib: anonymous memory of the agent.
        temperature_c: of the board; 125 is as good as no limit.
    """

    inferences_per_second: Annotated[float, Meta(ge=0, le=100_000)] = 9.3
    burst: Annotated[float, Meta(ge=0, le=1_000_000)] = 15.0
    audit_share: Annotated[float, Meta(ge=0, le=1)] = 0.005
    cpu_share: Annotated[float, Meta(gt=0, le=1)] | None = None
    memory_mib: Annotated[float, Meta(gt=0, le=1_000_000)] | None = None
    temperature_c: Annotated[float, Meta(gt=0, le=125)] = 80.0


Policy = Literal["pass", "mark", "withhold"]


class PolicyConfig(Section, frozen=True, kw_only=True):
    """``[policy]``: what a program gets for an input of each verdict.

    ``pass``: outputs, as if there were no guard; ``mark``: outputs, and ``policy`` says so; ``withhold``: none.

    Attributes:
        flagged: for inputs that the guard flags.
        not_checked: for inputs that could not be scored.
        not_audited: for doubtful inputs that the budget had no look left for.
    """

    flagged: Policy = "mark"
    not_checked: Policy = "pass"
    not_audited: Policy = "pass"


class QuarantineConfig(Section, frozen=True, kw_only=True):
    """``[quarantine]``: a folder on this device where flagged inputs are kept. Without this section none is.

    Attributes:
        path: the folder; nothing in it is ever sent anywhere.
        max_mib: beyond this the oldest are deleted.
        max_inputs: beyond this the oldest are deleted.
        max_days: older ones are deleted.
    """

    path: Path
    max_mib: Annotated[float, Meta(gt=0, le=1_000_000)] = 64.0
    max_inputs: Annotated[int, Meta(ge=1, le=1_000_000)] = 1000
    max_days: Annotated[float, Meta(gt=0, le=3650)] = 30.0


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
        retry_s: wait after a first failure; it doubles up to 32 times this. A download that came further goes on
            sooner.
        max_kib_per_s: bound on the download, in KiB a second.
        compress: ask the server to pack what it sends; worth it on a slow link.
        trial_inputs: healthy inferences that confirm a new model; until then the old one may come back.
    """

    metadata_url: Url
    targets_url: Url
    root: Path
    max_mib: Annotated[int, Meta(ge=1, le=MAX_MODEL_BYTES >> 20)] = 64
    timeout_s: Seconds = 120.0
    retry_s: Seconds = 5.0
    max_kib_per_s: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    compress: bool = False
    trial_inputs: Annotated[int, Meta(ge=1, le=1_000_000)] = 64


class RecalibrateConfig(Section, frozen=True, kw_only=True):
    """``[recalibrate]``: the hub may have the guard fitted anew on this device. Without this section it may not.

    Attributes:
        data: the owner's clean inputs: an npz or npy file, or an image folder. Without it only the sidecar's are left.
        timeout_s: seconds for one re-calibration.
    """

    data: Path | None = None
    timeout_s: Seconds = 900.0


class SpoolConfig(Section, frozen=True, kw_only=True):
    """``[spool]``: reports that wait for the hub.

    Attributes:
        max_mib: beyond this the oldest are dropped, reports first, and counted.
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
    """``[results]``: what came out for each input, one JSON object each.

    Attributes:
        path: a file; lines are appended when the report that counts them is on disk. ``-`` is standard output.
        topic: an MQTT topic; sent at once, and lost where there is no connection.
    """

    path: Path | None = None
    topic: NonEmpty | None = None


class AgentConfig(Section, frozen=True, kw_only=True):
    """The whole file.

    Attributes:
        fleet: id of the fleet.
        device: id of this device within it.
        model: the first model; it is copied into the state folder once, and releases replace that copy.
        sequence: the release number of that first model; 0 for one that was never released.
        state_dir: folder that belongs to this agent alone: spool, model slots, update metadata.
        broker: the MQTT broker.
        sources: where the inputs come from.
        window: how many inputs go into one report.
        alerts: flagged inputs that are told at once.
        budget: what the guard may take.
        policy: what a program gets for an input of each verdict.
        quarantine: where flagged inputs are kept.
        update: signed models.
        recalibrate: fitting the guard anew when the hub asks for it.
        spool: reports that wait for the hub.
        runtime: what runs the model.
        results: what came out for each input.
        linger_s: on stopping, how long to wait for the hub to acknowledge what is left.
        health_s: seconds between two health messages.
    """

    fleet: str
    device: str
    model: Path
    state_dir: Path
    broker: BrokerConfig
    sources: SourcesConfig
    sequence: Annotated[int, Meta(ge=0, le=2**53)] = 0
    window: WindowConfig = WindowConfig()
    alerts: AlertsConfig = AlertsConfig()
    budget: BudgetConfig = BudgetConfig()
    policy: PolicyConfig = PolicyConfig()
    quarantine: QuarantineConfig | None = None
    update: UpdateConfig | None = None
    recalibrate: RecalibrateConfig | None = None
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
    topics.check_fleet(config.fleet, f"{name}: fleet")
    topics.check_device(config.device, f"{name}: device")
    settings.check_broker(config.broker, name)
    if config.results and config.results.topic:
        settings.check_topic(config.results.topic, name, "results.topic")
    if config.sources.mqtt:
        settings.check_topic(config.sources.mqtt.topic, name, "sources.mqtt.topic", is_filter=True)
    _check_serial(config, name)
    if not any(getattr(config.sources, kind) not in (None, ()) for kind in config.sources.__struct_fields__):
        raise ConfigError(
            name, got="no source of inputs", expected="one section [sources.NAME]", do="add [sources.folder]"
        )
    return config


def _check_serial(config: AgentConfig, name: str) -> None:
    ports = config.sources.serial
    for port in ports:
        topics.check_fleet(port.name, f"{name}: sources.serial.name")
    if ports and topics.gateway_of(config.device) is not None:
        raise ConfigError(f"{name}: device", got=config.device, expected="a name without ~ for a gateway")
    for what in ("name", "port"):
        values = [getattr(port, what) for port in ports]
        if len(set(values)) < len(values):
            raise ConfigError(name, got=f"two [[sources.serial]] of one {what}", do="give each its own")
