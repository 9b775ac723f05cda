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

from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgeguard import settings
from edgeguard.contract import topics
from edgeguard.contract.private import MIN_DEVICES, Kind
from edgeguard.errors import ConfigError
from edgeguard.settings import BrokerConfig, NonEmpty, Section

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Probability = Annotated[float, Meta(gt=0, lt=1)]
Days = Annotated[int, Meta(ge=1, le=36_500)]


class StoreConfig(Section, frozen=True, kw_only=True):
    """``[store]``: the database.

    Attributes:
        url: a SQLAlchemy URL, ``postgresql+psycopg://...`` where several hubs share a database; without it, SQLite in
            the file ``hub.db`` of the state folder.
        reports_days: reports are kept whole for so many days, and then as sums a device, model and day.
        rollups_days: so many days these sums are kept.
        alerts_days: so many days alerts are kept.
        events_days: so many days the timeline goes back.
        audit_days: so many days the audit trail goes back.
        jobs_days: so many days after a case has ended its jobs and their files are kept; that of a release stays.
        models_days: what devices counted under a model is kept for so many days after the last one ran it.
        epoch_hours: counts of labels are told apart by epochs of so many hours.
        keep_epochs: so many epochs are told apart; older counts are kept as one sum.
        boots_kept: of so many boots a device the hub remembers for ever what it received, ...
        boots_days: ... and of any other for so many days after which it still hears the device.
    """

    url: NonEmpty | None = None
    reports_days: Days = 7
    rollups_days: Days = 400
    alerts_days: Days = 90
    events_days: Days = 400
    audit_days: Days = 3650
    jobs_days: Days = 90
    models_days: Days = 180
    epoch_hours: Annotated[int, Meta(ge=1, le=8760)] = 24
    keep_epochs: Annotated[int, Meta(ge=1, le=1000)] = 16
    boots_kept: Annotated[int, Meta(ge=1, le=100_000)] = 64
    boots_days: Days = 30


class WebConfig(Section, frozen=True, kw_only=True):
    """``[web]``: the HTTP server with the API, which asks for a token, and the releases that devices fetch.

    Attributes:
        host: address to listen on; only this machine by default.
        port: TCP port; 0 takes a free one and says which in the log.
        certificate: PEM file of the server's certificate, and those between it and its authority, for HTTPS; needs key.
        key: PEM file of that certificate's private key, without a pass phrase.
        anonymous: what may be done without a token, on a host of this machine alone; "viewer" may read everything.
        metrics: who may read /metrics: whoever has a token, or everyone.
    """

    host: NonEmpty = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    certificate: Path | None = None
    key: Path | None = None
    anonymous: Literal["none", "viewer"] = "none"
    metrics: Literal["token", "open"] = "token"


class ReleaseConfig(Section, frozen=True, kw_only=True):
    """``[release]``: the signed repository. Without this section repaired models are kept, not released.

    Attributes:
        folder: what is served: ``metadata`` and ``targets``.
        keys: the hub's private keys, those of timestamp, snapshot and repaired; never inside the served folder.
        base_url: the address under which devices reach the web server, shown in its status.
    """

    folder: Path
    keys: Path
    base_url: Annotated[str, Meta(pattern="^https?://[^/ ]", max_length=2000)] | None = None


class StepsConfig(Section, frozen=True, kw_only=True):
    """``[policy.steps]``: what the hub does by itself, what a person approves first, and what it never does.

    Attributes:
        inspect: search the hub's own copy of a suspected model for a backdoor.
        ask: what to ask the fleet for before a repair: channels ranked by activity, or votes on the least active.
        repair: repair a model in which a backdoor was confirmed.
        stage: sign a repaired model and roll it out.
        unchecked: the same for a repair of which the gate could not check every rule, where stage is auto.
        recalibrate: tell a device whose site has changed to fit its guard anew.
    """

    inspect: Literal["auto", "approve", "never"] = "auto"
    ask: Literal["never", "ranks", "votes"] = "never"
    repair: Literal["auto", "approve", "never"] = "auto"
    stage: Literal["auto", "approve", "never"] = "auto"
    unchecked: Literal["auto", "approve", "never"] = "approve"
    recalibrate: Literal["auto", "approve", "never"] = "never"


class PolicyConfig(Section, frozen=True, kw_only=True):
    """``[policy]``: when evidence is a suspicion, and how carefully a repaired model is rolled out.

    Attributes:
        alpha: labels times epochs times this is how many false suspicions are to be expected at most.
        device_alpha: a device shows an excess of its own when chance would show it with less than this.
        min_devices: so many devices must each show an excess; never more than run the model.
        quorum_share: the same as a share of the devices that run the model; the larger of both counts.
        min_flagged: fewer flagged inputs than this prove nothing.
        device_share: the largest share that one device may bring to what the features are pooled to.
        channels: how many channels a suspicion names.
        attempts: a worker that crashed this often is given up.
        worker_timeout_s: a worker that takes longer is ended, which counts as a crash.
        veto_s: seconds between release and roll-out in which an operator may object.
        canaries: devices that get a release first; a single one that lies can let a bad release pass this group.
        interval_s: seconds between two steps of the loop.
        assess_s: at least so many seconds between two looks at the evidence.
        ask_s: so many seconds the fleet has to answer what a repair would like to know.
        steps: who decides on each step.
    """

    alpha: Probability = 1e-5
    device_alpha: Probability = 0.05
    min_devices: Annotated[int, Meta(ge=1)] = 2
    quorum_share: Annotated[float, Meta(ge=0, le=1)] = 0.0025
    min_flagged: Annotated[int, Meta(ge=1)] = 20
    device_share: Annotated[float, Meta(gt=0, le=1)] = 0.5
    channels: Annotated[int, Meta(ge=1, le=4096)] = 16
    attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    worker_timeout_s: Annotated[float, Meta(gt=0)] = 7200.0
    veto_s: Annotated[float, Meta(ge=0)] = 0.0
    canaries: Annotated[int, Meta(ge=1)] = 1
    interval_s: Annotated[float, Meta(ge=0.05, le=3600)] = 1.0
    assess_s: Annotated[float, Meta(ge=0, le=86400)] = 10.0
    ask_s: Annotated[float, Meta(ge=0, le=86400)] = 60.0
    steps: StepsConfig = StepsConfig()


class GroupConfig(Section, frozen=True, kw_only=True):
    """``[[rollout.groups]]``: one group of a roll-out after the canaries.

    Attributes:
        share: how far it goes: the share of the devices concerned that are offered the release by its end.
        success: so many of the group's devices must fare well before the next group begins.
        error: where more of them than this fail, the roll-out stops.
    """

    share: Annotated[float, Meta(gt=0, le=1)]
    success: Annotated[float, Meta(gt=0, le=1)] = 0.9
    error: Annotated[float, Meta(ge=0, lt=1)] = 0.1


class RolloutConfig(Section, frozen=True, kw_only=True):
    """``[rollout]``: how a release goes to the fleet, group by group. The canaries come first, and all must fare well.

    Attributes:
        groups: the groups after the canaries, each larger than the one before; the last one is everybody.
        soak_s: a device must run the release for so many seconds before it is said to fare well.
        min_inputs: its guard must have looked at so many inputs before that, too. 0: no inputs are waited for.
        timeout_s: seconds that a device that is there has to answer, and one that runs the release to prove itself.
        patience_s: seconds that a device may refuse the release, or be unable to fetch it, before it has failed.
        false_alarm: the probability that a harmless release is stopped by chance, over its whole roll-out.
        on_error: what to do where too many devices fail: wait for a person, leave it at that, or bring those who took
            it back to the model before. To go back takes as many failing devices as ``policy.min_devices``.
    """

    groups: Annotated[tuple[GroupConfig, ...], Meta(min_length=1, max_length=32)] = (
        GroupConfig(share=0.1),
        GroupConfig(share=0.5),
        GroupConfig(share=1.0),
    )
    soak_s: Annotated[float, Meta(ge=0, le=30 * 86400)] = 3600.0
    min_inputs: Annotated[int, Meta(ge=0, le=10**9)] = 50
    timeout_s: Annotated[float, Meta(gt=0, le=30 * 86400)] = 86400.0
    patience_s: Annotated[float, Meta(ge=0, le=30 * 86400)] = 900.0
    false_alarm: Probability = 0.01
    on_error: Literal["pause", "abort", "back"] = "pause"


class NotifyConfig(Section, frozen=True, kw_only=True):
    """``[[notify]]``: one place to tell of events.

    Attributes:
        name: what this place is called in logs.
        kind: an HTTP POST, a message of the broker, or sensors that Home Assistant discovers at the broker.
        events: the kinds of events to tell; without, all of them.
        url: where a webhook posts to.
        secret_file: file whose first line is the key that a webhook's body is signed with.
        prefix: Home Assistant's discovery prefix.
    """

    name: Name
    kind: Literal["webhook", "mqtt", "homeassistant"]
    events: Annotated[tuple[NonEmpty, ...], Meta(max_length=64)] = ()
    url: Annotated[str, Meta(pattern="^https?://[^/ ]", max_length=2000)] | None = None
    secret_file: Path | None = None
    prefix: NonEmpty = "homeassistant"


class ModelConfig(Section, frozen=True, kw_only=True):
    """``[[models]]``: one model that the fleet runs.

    Attributes:
        name: what its releases are called.
        guarded: the guarded ``.tflite`` that the devices run.
        keras: the trainable model that it was converted from; must be given, but for a private model.
        data: clean data for inspection and repair: a name or a path; must be given, but for a private model.
        sequence: the release number of ``guarded``; 0 for one that was never released.
        private: the hub neither inspects nor repairs it, asks devices for no channels and stores no features of it;
            needs ``[private]``, and neither ``keras`` nor ``data``.
    """

    name: Name
    guarded: Path
    keras: Path | None = None
    data: NonEmpty | None = None
    sequence: Annotated[int, Meta(ge=0, le=2**53)] = 0
    private: bool = False


class PrivateConfig(Section, frozen=True, kw_only=True):
    """``[private]``: the three parties that private models are inspected by, and what the fleet is asked through them.

    Attributes:
        parties: the file in which ``edgeguard private init --join`` brought the parties' descriptions together.
        kind: what a round asks of devices: ranks of all channels, or votes on the least active ones.
        share: so much of a layer a round names.
        min_devices: with fewer valid submissions a round opens nothing.
    """

    parties: Path
    kind: Kind = "ranks"
    share: Annotated[float, Meta(gt=0, le=0.9)] = 0.2
    min_devices: Annotated[int, Meta(ge=MIN_DEVICES, le=1_000_000)] = 10


class IngestConfig(Section, frozen=True, kw_only=True):
    """``[ingest]``: how reports come in, and how much of it one device may bring. Each worker counts for itself.

    Attributes:
        workers: so many processes take reports and alerts, from one shared subscription; 0: the hub's own process does.
        group: name of that subscription; all hubs of a fleet that share it have the same database.
        ack_every_s: a device gets at most one acknowledgement in this time, which stands for all reports before it.
        messages_per_second: what one device may send for ever. What exceeds its limits is not stored and not
            acknowledged to it: it sends that again later.
        burst_messages: what it may send at once.
        kib_per_second: the same for the size of its messages.
        burst_mib: the same for the size at once; no message is larger than half a MiB.
        dead_letters_per_minute: rejected messages of one device that are kept and told in the log.
    """

    workers: Annotated[int, Meta(ge=0, le=64)] = 0
    group: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "edgeguard-hub"
    ack_every_s: Annotated[float, Meta(ge=0, le=60)] = 1.0
    messages_per_second: Annotated[float, Meta(gt=0, le=1e6)] = 50.0
    burst_messages: Annotated[int, Meta(ge=1, le=10**6)] = 1024
    kib_per_second: Annotated[float, Meta(gt=0, le=1e6)] = 512.0
    burst_mib: Annotated[float, Meta(ge=1, le=1024)] = 8.0
    dead_letters_per_minute: Annotated[float, Meta(gt=0, le=1e6)] = 10.0


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
    ingest: IngestConfig = IngestConfig()
    web: WebConfig = WebConfig()
    release: ReleaseConfig | None = None
    policy: PolicyConfig = PolicyConfig()
    rollout: RolloutConfig = RolloutConfig()
    models: tuple[ModelConfig, ...] = ()
    private: PrivateConfig | None = None
    notify: tuple[NotifyConfig, ...] = ()


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
    topics.check_fleet(config.fleet, f"{name}: fleet")
    settings.check_broker(config.broker, name)
    names = [model.name for model in config.models]
    if len(set(names)) != len(names):
        raise ConfigError(name, got="two [[models]] of one name", do="give each its own name")
    for model in config.models:
        _check_model(model, config.private, name)
    if config.release and config.release.keys.resolve().is_relative_to(config.release.folder.resolve()):
        raise ConfigError(
            name, got="release.keys inside release.folder, which is served to everyone", do="keep the keys elsewhere"
        )
    shares = [group.share for group in config.rollout.groups]
    if shares[-1] != 1 or any(after <= before for before, after in pairwise(shares)):
        raise ConfigError(
            f"{name}: [[rollout.groups]]", got=f"shares {shares}", expected="growing ones of which the last is 1"
        )
    _check_web(config.web, name)
    _check_notify(config.notify, name)
    models = tuple(
        msgspec.structs.replace(model, data=model.data and _data(model.data, base.absolute()))
        for model in config.models
    )
    return msgspec.structs.replace(config, models=models)


def is_loopback(host: str) -> bool:
    """Whether a name or address can only mean this machine."""
    try:
        return host.lower() == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _check_model(model: ModelConfig, private: PrivateConfig | None, name: str) -> None:
    """Raise ConfigError where a model has not what is needed, or a private one what the hub shall not have."""
    what = f"{name}: [[models]] {model.name}"
    for key in ("keras", "data"):
        if (getattr(model, key) is None) != model.private:
            got = f"{key} of a private model" if model.private else f"no {key}"
            raise ConfigError(what, got=got, do="remove this key" if model.private else "add this key")
    if model.private and private is None:
        raise ConfigError(what, got="a private model without [private]", do="name the parties there")


def _check_web(web: WebConfig, name: str) -> None:
    """Raise ConfigError for half a certificate, and where strangers would reach what needs no token."""
    if bool(web.certificate) != bool(web.key):
        raise ConfigError(name, got="only one of web.certificate and web.key", do="give both or neither")
    if web.anonymous != "none" and not is_loopback(web.host):
        raise ConfigError(
            f"{name}: web.anonymous", got=f'"{web.anonymous}" with web.host {web.host}', expected='"none"',
            do="make tokens: edgeguard hub token add",
        )  # fmt: skip


def _check_notify(targets: tuple[NotifyConfig, ...], name: str) -> None:
    """Raise ConfigError for a webhook without an address or a key, and for two places of one name."""
    for target in targets:
        if target.kind == "webhook" and (target.url is None or target.secret_file is None):
            missing = "url" if target.url is None else "secret_file"
            what = f"{name}: [[notify]] {target.name}"
            raise ConfigError(what, got=f"a webhook without {missing}", do="add this key")
    if len({target.name for target in targets}) != len(targets):
        raise ConfigError(name, got="two [[notify]] of one name", do="give each its own name")


def store_url(config: HubConfig) -> str:
    """Where the database is."""
    return config.store.url or f"sqlite:///{config.state_dir / 'hub.db'}"


def _data(data: str, base: Path) -> str:
    """A path where there is such a file or folder beside the configuration, else the name as it stands."""
    try:
        return str(base / data) if (base / data).exists() else data
    except (OSError, ValueError):
        return data
