"""A re-calibration on the device: whether it may be, the short-lived child that does it, and the last checks.

Rules enforced here:

* only clean data calibrates: the owner's, which the configuration names, or the sidecar's. A command names no place,
  and what the device was fed is never used;
* at most one runs: ``edgeguard calibrate`` in a process of its own, of low priority, with a time limit, and ended with
  the agent. The agent goes on inferring meanwhile, and loads neither converters nor a command line;
* what it wrote counts only where it ended well, and still has to load, to be the model that runs, to take and give
  what that one does, and to pass its own self-test, before it replaces anything.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeguard.agent.commands import Outcome
from edgeguard.agent.config import RecalibrateConfig
from edgeguard.contract.guard import GuardMetadata
from edgeguard.detection import replacement, runtime, sidecar
from edgeguard.detection.guarded import GuardedModel
from edgeguard.detection.sidecar import Sidecar
from edgeguard.detection.statistics import inputs_needed
from edgeguard.errors import ConfigError, ModelError
from firmware_bridge.slots import Slot

Array = npt.NDArray[Any]

_MODEL, _DATA, _ERRORS = "model.tflite", "clean.npz", "errors.txt"
_NAME = "edgeguard: "
"""What the command line's one line of an error begins with."""
_MAX_ERRORS = 4096

log = logging.getLogger(__name__)

_PROGRAM = """
import contextlib, ctypes, os, signal
with contextlib.suppress(AttributeError):  # no prctl: it then outlives an agent that is killed
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
with contextlib.suppress(OSError):  # a service may be forbidden to
    os.nice(10)
if os.getppid() == {parent}:
    from edgeguard.cli import main
    main()
"""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What the child wrote: a file made of the slot ``made_of``, and its sidecar where that had one."""

    content: bytes
    sidecar: bytes | None
    made_of: Slot


def clean_data(
    source: Literal["sidecar", "owner"],
    config: RecalibrateConfig,
    metadata: GuardMetadata,
    held: Sidecar | None,
) -> Path | Array | Outcome:
    """What to calibrate with: a path, or inputs [N, ...]; an outcome that refuses where there is nothing.

    Args:
        source: as the hub asks for it.
        config: the ``[recalibrate]`` section.
        metadata: of the model that runs.
        held: its sidecar, None where it is not on this device.
    """
    if source == "owner":
        return config.data or _refused("[recalibrate] in this device's configuration names no data")
    if held is None:
        return _refused("the model has no sidecar on this device")
    inputs: Array = np.concatenate([held.overlays, held.self_test])
    needed = 2 * inputs_needed(metadata.fpr)
    if len(inputs) < needed:
        why = f"{needed} are needed for a false-positive rate of {metadata.fpr:g}"
        return _refused(f"the sidecar holds {len(inputs)} clean inputs; {why}")
    return inputs


class Recalibrator:
    """The child. Time is passed in, in seconds of any steady clock.

    Args:
        folder: for what the child reads and writes; what lies there is removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._child: subprocess.Popen[bytes] | None = None
        self._deadline = 0.0
        self._made_of: Slot | None = None
        shutil.rmtree(folder, ignore_errors=True)

    def begin(self, made_of: Slot, data: Path | Array, *, runtime_name: str, timeout_s: float, now_s: float) -> None:
        """Start to calibrate the file in a slot. None may be at work.

        Args:
            made_of: the slot that runs.
            data: as :func:`clean_data` chose it.
            runtime_name: what runs the model on this device, so that its guard is measured there.
            timeout_s: seconds after which the child is killed.
            now_s: the time.

        Raises:
            ConfigError: the folder cannot be written, or no process be started.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not isinstance(data, Path):
                np.savez(self._folder / _DATA, x=data)
                data = self._folder / _DATA
            arguments = [
                "calibrate",
                str(made_of.path),
                f"--data={data}",
                f"--output={self._folder / _MODEL}",
                "--json",
            ]
            with (self._folder / _ERRORS).open("wb") as errors:
                self._child = subprocess.Popen(
                    [sys.executable, "-c", _PROGRAM.format(parent=os.getpid()), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env={**os.environ, runtime.ENVIRONMENT: runtime_name},
                    start_new_session=True,  # Ctrl-C in a terminal is the agent's to handle
                )
        except OSError as error:
            raise ConfigError("re-calibration", got=error.strerror or str(error), do=f"check {self._folder}") from error
        self._made_of, self._deadline = made_of, now_s + timeout_s

    def step(self, *, now_s: float) -> Calibrated | Outcome | None:
        """Look at the child. Never waits. None while it is at work, and where there is none."""
        if self._child is None or self._made_of is None:
            return None
        code = self._child.poll()
        if code is None and now_s < self._deadline:
            return None
        try:
            if code == 0:
                return self._written(self._made_of)
            return Outcome(state="failed", reason=self._complaint(code))
        except OSError as error:
            return Outcome(state="failed", reason=f"the result of the re-calibration: {error.strerror}")
        finally:
            self.close()

    def close(self) -> None:
        """End the child, if there is one, and remove what it wrote."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _written(self, made_of: Slot) -> Calibrated:
        model = self._folder / _MODEL
        beside = sidecar.path_beside(model)
        return Calibrated(
            content=model.read_bytes(), sidecar=beside.read_bytes() if beside.exists() else None, made_of=made_of
        )

    def _complaint(self, code: int | None) -> str:
        if code is None:
            return "the re-calibration took too long"
        said = (self._folder / _ERRORS).read_bytes()[-_MAX_ERRORS:].decode(errors="replace")
        log.warning("edgeguard calibrate: %s", said.strip())
        told = [line.removeprefix(_NAME) for line in said.splitlines() if line.startswith(_NAME)]
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return told[-1] if told else f"the re-calibration was ended {how}"


def admit(done: Calibrated, running: GuardedModel, *, load: Callable[[bytes], GuardedModel]) -> GuardedModel:
    """The last checks before a re-calibrated model may replace the running one.

    The range of the input is part of what must stay: it says how pictures become numbers.

    Args:
        done: what the child wrote.
        running: the model that runs.
        load: opens a model.

    Raises:
        ModelError: it does not load or run, is another model, or fails its self-test.
        TrustError: its sidecar is another one.
    """
    model = load(done.content)
    new, old = model.metadata, running.metadata
    if new.model_digest != old.model_digest:
        raise ModelError(
            "re-calibrated model: model_digest",
            got=new.model_digest,
            expected=f"{old.model_digest}, as the running model",
        )
    replacement.check_interface(model, running, name="re-calibrated model")
    model.infer(np.zeros(new.input.shape, new.input.dtype))
    if new.sidecar_digest is not None:
        held = sidecar.decode(done.sidecar or b"", digest=new.sidecar_digest, metadata=new)
        outcome = sidecar.self_test(held, model.infer)
        if not outcome.passed:
            raise ModelError("re-calibrated model: self-test", got="; ".join(outcome.wrong)[:200])
    return model


def _refused(reason: str) -> Outcome:
    return Outcome(state="refused", reason=reason)
