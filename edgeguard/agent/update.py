"""From a hint to a model that may run: when to fetch, what to do with the outcome, and the last checks.

Rules enforced here:

* a hint has no authority: only what the fetch child verified against signed metadata is looked at;
* at most one fetch runs, in a process of its own; the agent goes on inferring meanwhile;
* an attempt that was refused or failed is repeated while the hint stands, ever more rarely: an attack on the
  network may pass, and then the genuine release must get through;
* a verified file still has to load, to be the model that its signer described, and to take and give what the
  running model does, before it replaces anything.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edgeguard.agent.config import UpdateConfig
from edgeguard.agent.link import Hint, backoff
from edgeguard.contract.messages import Desired
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import ConfigError, ModelError, TrustError
from edgeguard.release.client import FetchRequest, read_outcome, spawn_fetch

_GRACE_S = 10.0
"""How much longer than its own time-out a fetch may take before it is killed."""
_RETRY_CAP = 32
"""The wait between attempts grows up to this many times the first one."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What became of a hint, as a Reported message says it."""

    state: Literal["fetching", "updated", "refused", "failed"]
    sequence: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A verified file waits to be admitted; the digests are those that its signer vouched for."""

    sequence: int
    path: Path
    file_digest: str
    model_digest: str
    guard_digest: str


class Updater:
    """Follows the newest hint. Time is passed in, in seconds of any steady clock.

    Args:
        config: the ``[update]`` section; None refuses every hint.
        folder: folder for the trusted metadata and for fetched files.
        spawn: starts a fetch.
    """

    def __init__(
        self,
        config: UpdateConfig | None,
        folder: Path,
        *,
        spawn: Callable[[FetchRequest], subprocess.Popen[bytes]] = spawn_fetch,
    ) -> None:
        self._config = config
        self._folder = folder
        self._spawn = spawn
        self._desired: Desired | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._deadline = 0.0
        self._retry_at = 0.0
        self._failures = 0

    def hint(self, hint: Hint, *, running_sequence: int, now_s: float) -> Progress | None:
        """Take a new hint. The broker's repetition of a known one changes nothing.

        Returns:
            What can be said at once, None while that is open.
        """
        desired = hint.desired
        if desired == self._desired and not hint.fresh:
            return None
        if desired != self._desired:
            self.close()
        self._desired, self._failures, self._retry_at = None, 0, now_s
        if desired.sequence == running_sequence:
            return Progress(state="updated", sequence=desired.sequence)
        if desired.sequence < running_sequence:
            reason = f"sequence {desired.sequence} is older than {running_sequence}, which runs"
            return Progress(state="refused", sequence=desired.sequence, reason=reason)
        if self._config is None:
            reason = "this device has no [update] section in its configuration"
            return Progress(state="refused", sequence=desired.sequence, reason=reason)
        self._desired = desired
        return None

    def step(self, *, model_digest: str, running_sequence: int, now_s: float) -> Progress | Fetched | None:
        """Start a fetch when one is due, or look at the one that runs. Never waits.

        Args:
            model_digest: of the model that runs.
            running_sequence: its release number.
            now_s: the time.
        """
        if self._child is not None:
            return self._look(self._child, now_s)
        if self._config is None or self._desired is None or now_s < self._retry_at:
            return None
        sequence = self._desired.sequence
        try:
            self._child = self._spawn(self._request(self._config, self._desired, model_digest, running_sequence))
        except ConfigError as error:
            return self.defer(sequence, "failed", str(error), now_s=now_s)
        self._deadline = now_s + self._config.timeout_s + _GRACE_S
        # What became of an earlier attempt stays visible until this one has an outcome of its own.
        return None if self._failures else Progress(state="fetching", sequence=sequence)

    def _look(self, child: subprocess.Popen[bytes], now_s: float) -> Progress | Fetched | None:
        assert self._desired is not None
        sequence = self._desired.sequence
        result = read_outcome(child)
        if result is None and now_s < self._deadline:
            return None
        if result is None:
            self.close()
            return self.defer(sequence, "failed", "the fetch took too long", now_s=now_s)
        self._child = None
        if result.state != "fetched":
            return self.defer(sequence, result.state, result.reason, now_s=now_s)
        return Fetched(
            sequence=sequence,
            path=Path(str(result.path)),
            file_digest=str(result.file_digest),
            model_digest=str(result.model_digest),
            guard_digest=str(result.guard_digest),
        )

    def defer(self, sequence: int, state: Literal["refused", "failed"], reason: str, *, now_s: float) -> Progress:
        """The attempt at a release came to nothing: plan the next one, if that is still what is hinted at."""
        if self._config is not None and self._desired is not None and self._desired.sequence == sequence:
            first = self._config.retry_s
            self._retry_at = now_s + backoff(self._failures, first_s=first, cap_s=first * _RETRY_CAP)
            self._failures += 1
        return Progress(state=state, sequence=sequence, reason=reason[:500])

    def settle(self, sequence: int) -> None:
        """This release runs now; only a newer hint stays open."""
        if self._desired is not None and self._desired.sequence <= sequence:
            self._desired = None

    def close(self) -> None:
        """Stop a fetch that runs."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _request(self, config: UpdateConfig, desired: Desired, digest: str, sequence: int) -> FetchRequest:
        return FetchRequest(
            metadata_url=config.metadata_url,
            targets_url=config.targets_url,
            metadata_dir=str(self._folder / "metadata"),
            root=str(config.root),
            target=desired.target,
            sequence=desired.sequence,
            running_model_digest=digest,
            running_sequence=sequence,
            staging_dir=str(self._folder / "staging"),
            max_bytes=config.max_mib << 20,
            timeout=config.timeout_s,
        )


def admit(
    content: bytes, fetched: Fetched, running: GuardedModel, *, load: Callable[[bytes], GuardedModel]
) -> GuardedModel:
    """The last checks before a fetched model may replace the running one.

    Args:
        content: the fetched file.
        fetched: what its signer said of it, as the fetch verified it.
        running: the model that runs.
        load: opens a model.

    Raises:
        TrustError: the file is not the one that was verified, or describes itself otherwise than its signer.
        ModelError: it does not load or run, or takes or gives something else than the running model.
    """
    digest = hashlib.sha256(content).hexdigest()
    if digest != fetched.file_digest:
        raise TrustError("fetched model", got=f"SHA-256 {digest}", expected=fetched.file_digest)
    model = load(content)
    for name in ("model_digest", "guard_digest"):
        if getattr(model.metadata, name) != getattr(fetched, name):
            raise TrustError(
                f"fetched model: {name}", got=getattr(model.metadata, name), expected=getattr(fetched, name)
            )
    for what, new, old in (
        ("input and outputs", model.interface(), running.interface()),
        ("input range", model.metadata.input, running.metadata.input),
        ("classes", model.metadata.classes, running.metadata.classes),
        ("class output", model.metadata.class_output, running.metadata.class_output),
    ):
        if new != old:
            raise ModelError(f"fetched model: {what}", got=new, expected=f"{old}, as the running model")
    model.infer(np.zeros(model.metadata.input.shape, model.metadata.input.dtype))
    return model
