"""What must be right before the agent starts: its state folder, its model, its trusted root, its runtime.

Rules enforced here:

* the first model is installed only once it has proved to load; nothing half-written is left when it does not;
* where the installed model turns out to be damaged, the one before it runs, if there is one; the same where one that
  is still on trial does not load, fails its self-test, or was started again and again and never confirmed;
* what neither slot needs any more is removed;
* one agent to a state folder.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from edgeguard import broker, disk
from edgeguard.agent.config import AgentConfig, RecalibrateConfig, RuntimeConfig, UpdateConfig
from edgeguard.agent.inference import Running
from edgeguard.agent.sources import base, camera, folder, serial, stream, topic
from edgeguard.agent.trial import STARTS, Trial
from edgeguard.contract.guard import GuardMetadata, ModelInput
from edgeguard.detection import runtime, sidecar
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import ConfigError, EdgeGuardError, ModelError, TrustError
from edgeguard.settings import BrokerConfig
from firmware_bridge.slots import FOLDER, RECORD, Slots

SLOTS_FOLDER = FOLDER
_LOCK_FILE = "lock"
_TRIAL_FILE = "trial.json"

log = logging.getLogger(__name__)


def check(config: AgentConfig) -> None:
    """Try everything once that a start needs, and leave nothing behind: model, source, trusted root, broker.

    Raises:
        EdgeGuardError: the first thing that is wrong.
    """
    load = loader(config.runtime)
    slots = config.state_dir / SLOTS_FOLDER
    model = load(Slots(slots).load() if (slots / RECORD).exists() else _read_model(config.model))
    for source in open_sources(config, model.metadata.input):
        source.close()
    check_root(config.update)
    check_clean_data(config.recalibrate)
    broker.check(config.broker)


@dataclass(frozen=True, kw_only=True)
class State:
    """What lies in the state folder, opened: it belongs to this process until it ends."""

    lock: IO[bytes]
    slots: Slots
    trial: Trial
    load: Callable[[bytes], GuardedModel]


def open_state(config: AgentConfig) -> tuple[State, Running]:
    """Claim the state folder and open the model that runs.

    Raises:
        ConfigError, ModelError, TrustError: see :func:`claim` and :func:`open_model`.
    """
    lock = claim(config.state_dir)
    load = loader(config.runtime)
    slots, model = open_model(config, load)
    running = Running(model=model, sidecar=sidecar_of(config, model.metadata), sequence=slots.active().sequence)
    tidy(slots, model.metadata)
    return State(lock=lock, slots=slots, trial=trial(config), load=load), running


def check_clean_data(config: RecalibrateConfig | None) -> None:
    """Raises ConfigError unless the owner's clean data, where some is named, is there."""
    if config is not None and config.data is not None and not os.access(config.data, os.R_OK):
        raise ConfigError(
            f"recalibrate.data {config.data}",
            got="nothing that can be read",
            expected="an npz or npy file, or a folder of images",
            do="put the clean inputs there, or leave the key out",
        )


def open_sources(config: AgentConfig, expected: ModelInput) -> list[base.Source]:
    """Every source that the configuration names, ready to be opened.

    Raises:
        ConfigError: one cannot be used.
        ModelError: the model takes no images, which one of them brings.
    """
    chosen = config.sources
    made: list[base.Source] = []
    try:
        if chosen.folder:
            made.append(folder.FolderSource(chosen.folder.path, expected, keep=chosen.folder.keep))
        if chosen.socket:
            made.append(stream.SocketSource(chosen.socket.path, expected))
        if chosen.stdin:
            made.append(stream.StdinSource(expected))
        if chosen.mqtt:
            name = f"edgeguard-{config.fleet}-{config.device}-input"
            other = BrokerConfig(host=chosen.mqtt.host, port=chosen.mqtt.port) if chosen.mqtt.host else config.broker
            made.append(topic.TopicSource(other, chosen.mqtt.topic, client_id=name, expected=expected))
        if chosen.serial:
            made.append(serial.SerialSource(chosen.serial))
        if chosen.camera:
            made.append(camera.CameraSource(chosen.camera.device, expected, per_second=chosen.camera.per_second))
    except EdgeGuardError:
        for source in made:
            source.close()
        raise
    return made


def sidecar_of(config: AgentConfig, metadata: GuardMetadata) -> sidecar.Sidecar | None:
    """The sidecar of a model, from beside the configured one or from the state folder; None where there is none.

    Its digest stands in the model's metadata, so that it does not matter where it comes from. One that does not fit is
    no sidecar.
    """
    if metadata.sidecar_digest is None:
        return None
    kept = _kept(config, metadata.sidecar_digest)
    for path in (kept, sidecar.path_beside(config.model)):
        try:
            with path.open("rb") as file:
                content = file.read(sidecar.MAX_SIDECAR + 1)
            found = sidecar.decode(content, digest=metadata.sidecar_digest, metadata=metadata, name=f"sidecar {path}")
        except OSError:
            continue
        except EdgeGuardError as error:
            log.warning("no further looks at doubtful inputs: %s", error)
            continue
        if path != kept:
            keep(kept, content)
        return found
    log.warning("the model has a sidecar, but it is not on this device: doubtful inputs get no further looks")
    return None


def keep(path: Path, content: bytes) -> None:
    """Keep a copy in the state folder; without one the device does with what it has."""
    try:
        disk.write(path, content)
    except OSError as error:
        log.warning("the sidecar is not kept: %s", error.strerror)


def places_of_sidecar(config: AgentConfig, digest: str) -> tuple[str, ...]:
    """Where the sidecar of this digest may lie, the best place first."""
    return (str(_kept(config, digest)), str(sidecar.path_beside(config.model)))


def _kept(config: AgentConfig, digest: str) -> Path:
    return config.state_dir / SLOTS_FOLDER / f"{digest}{sidecar.SUFFIX}"


def tidy(slots: Slots, metadata: GuardMetadata) -> None:
    """Remove what neither slot needs; ``metadata`` is of the model that runs. A disk that refuses keeps it."""
    try:
        slots.tidy(also=[metadata.sidecar_digest] if metadata.sidecar_digest else [])
    except (ConfigError, TrustError) as error:
        log.warning("what is not needed any more stays on the disk: %s", error)


def loader(config: RuntimeConfig) -> Callable[[bytes], GuardedModel]:
    """What opens a guarded model on this device's runtime.

    Raises:
        ConfigError: there is none, or it is TensorFlow, which is not for devices.
    """
    name = runtime.choose(config.name)
    if name == "tensorflow":
        raise ConfigError(
            "runtime",
            got=name,
            expected="litert or tflite-runtime",
            do="install edgeguard[device] on this device",
        )
    return partial(GuardedModel.load, threads=config.threads, runtime=name)


def open_model(config: AgentConfig, load: Callable[[bytes], GuardedModel]) -> tuple[Slots, GuardedModel]:
    """The slots and the model that they say runs; the first model is installed once it has proved to load.

    Raises:
        ConfigError: a file cannot be read or written.
        ModelError: the model cannot be used, and there is none before it.
        TrustError: the installed model is damaged, and there is none before it.
    """
    folder = config.state_dir / SLOTS_FOLDER
    if not (folder / RECORD).exists():
        content = _read_model(config.model)
        model = load(content)
        named = model.metadata.sidecar_digest
        return Slots.install(folder, content, sequence=config.sequence, sidecar=named), model
    slots = Slots(folder)
    if slots.confirmed:
        try:
            return slots, load(slots.load())
        except (ModelError, TrustError) as error:
            return slots, _model_before(slots, load, error, has_failed=False)
    try:
        return slots, _on_trial(config, slots, load)
    except (ModelError, TrustError) as error:
        # A file that was damaged here is no fault of the model; it may be fetched again.
        return slots, _model_before(slots, load, error, has_failed=isinstance(error, ModelError))


def _on_trial(config: AgentConfig, slots: Slots, load: Callable[[bytes], GuardedModel]) -> GuardedModel:
    """Start a model that is not confirmed yet once more.

    Raises:
        ModelError: it has failed, and there is one before it; or it does not load.
        TrustError: its file is damaged.
        ConfigError: the start cannot be counted.
    """
    file_digest, starts = slots.active().sha256, trial(config)
    if starts.failed(file_digest):
        _leave(slots, ModelError("model on trial", got=f"{STARTS} starts", expected="healthy inputs before"))
    # On disk before the model is met at all: it may crash the runtime.
    starts.begin(file_digest)
    model = load(slots.load())
    held = sidecar_of(config, model.metadata)
    if held is not None and not (outcome := sidecar.self_test(held, model.infer)).passed:
        _leave(slots, ModelError("model on trial: self-test", got="; ".join(outcome.wrong)[:200] or "not passed"))
    return model


def _leave(slots: Slots, error: ModelError) -> None:
    """Raise ``error`` where there is a model to go back to; where there is none, this one is better than nothing."""
    if has_previous(slots):
        raise error
    log.warning("there is no model to go back to: %s", error)


def has_previous(slots: Slots) -> bool:
    """Whether there is a whole model to go back to."""
    try:
        return slots.previous() is not None
    except TrustError as error:
        log.warning("the model before cannot be used: %s", error)
        return False


def _model_before(
    slots: Slots, load: Callable[[bytes], GuardedModel], error: EdgeGuardError, *, has_failed: bool
) -> GuardedModel:
    """The model before the active one, where there is one; else ``error`` is raised."""
    if not has_previous(slots):
        raise error
    slots.revert(str(error), has_failed=has_failed)
    return load(slots.load())


def trial(config: AgentConfig) -> Trial:
    """The count of starts, beside the slots."""
    return Trial(config.state_dir / SLOTS_FOLDER / _TRIAL_FILE)


def claim(folder: Path) -> IO[bytes]:
    """Make the state folder and lock it, so that no second agent works in it; the lock ends with the process.

    Returns:
        The lock; it is held while this file is open.

    Raises:
        ConfigError: the folder cannot be written, or another agent holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK_FILE).open("ab")
    except OSError as error:
        raise ConfigError(
            f"state folder {folder}",
            got=error.strerror,
            expected="a folder to write in",
            do="check state_dir",
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(
            f"state folder {folder}",
            got="another agent at work in it",
            do="stop it or choose another state_dir",
        ) from error
    return file


def _read_model(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"model {path}", got=error.strerror, expected="a guarded .tflite file", do="check the path"
        ) from error


def check_root(update: UpdateConfig | None) -> None:
    """Raise ConfigError where updates are configured and the trusted root cannot be read."""
    if update is not None and not os.access(update.root, os.R_OK):
        raise ConfigError(
            f"trusted root {update.root}",
            got="no readable file",
            do="copy it from the hub by a safe way",
        )
