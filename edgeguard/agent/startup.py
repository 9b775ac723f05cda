"""What must be right before the agent starts: its state folder, its model, its trusted root, its runtime.

Rules enforced here:

* the first model is installed only once it has proved to load; nothing half-written is left when it does not;
* where the installed model turns out to be damaged, the one before it runs, if there is one; the same where it
  was started again and again and never filled a window;
* one agent to a state folder.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

from edgeguard import broker
from edgeguard.agent.config import AgentConfig, RuntimeConfig, UpdateConfig
from edgeguard.agent.source import FolderSource
from edgeguard.agent.trial import STARTS, Trial
from edgeguard.detection import runtime
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import ConfigError, ModelError, TrustError
from firmware_bridge.slots import RECORD, Slots

SLOTS_FOLDER = "slots"
_LOCK_FILE = "lock"
_TRIAL_FILE = "trial.json"

log = logging.getLogger(__name__)


def check(config: AgentConfig) -> None:
    """Try everything once that a start needs, and leave nothing behind: model, source, trusted root, broker.

    Raises:
        EdgeGuardError: the first thing that is wrong.
    """
    load = loader(config.runtime)
    folder = config.state_dir / SLOTS_FOLDER
    model = load(Slots(folder).load() if (folder / RECORD).exists() else _read_model(config.model))
    expected = model.metadata.input
    FolderSource(config.source.path, shape=expected.shape, dtype=expected.dtype)
    check_root(config.update)
    broker.check(config.broker)


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
        return Slots.install(folder, content, sequence=config.sequence), model
    slots = Slots(folder)
    try:
        model = load(slots.load())
    except (ModelError, TrustError) as error:
        if slots.previous() is None:
            raise
        slots.revert(str(error))
        return slots, load(slots.load())
    if slots.confirmed:
        return slots, model
    starts = trial(config)
    if starts.failed(model.file_digest):
        try:
            slots.revert(f"the newer one was started {STARTS} times and never filled a window")
        except (ConfigError, TrustError) as error:
            log.warning("the model never filled a window, but there is no other: %s", error)
        else:
            return slots, load(slots.load())
    starts.begin(model.file_digest)
    return slots, model


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
