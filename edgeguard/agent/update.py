"""From a hint to a model that may run: when to fetch, when to check, and how a checked model is put in place.

Rules enforced here:

* a hint has no authority: only what the fetch child verified against signed metadata is looked at;
* at most one child runs, first one that fetches, then one that checks; the agent goes on inferring meanwhile;
* an attempt that was refused or failed is repeated while the hint stands, ever more rarely: an attack on the
  network may pass, and then the genuine release must get through. One that ran out of time, but brought the download
  further, is repeated soon;
* what was fetched and checked against one model is put in place of no other;
* a model is put in place in an order in which the power may fail at any instant: its sidecar, the file, the record of
  both, its first start, and only then, in one rename, that it runs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeguard.agent.admission import Answer, Fetched, read_answer
from edgeguard.agent.config import UpdateConfig
from edgeguard.agent.inference import Running
from edgeguard.agent.link import Hint, backoff
from edgeguard.agent.trial import Trial
from edgeguard.contract.guard import GuardMetadata
from edgeguard.contract.messages import Desired
from edgeguard.detection.guarded import GuardedModel
from edgeguard.detection.sidecar import Sidecar
from edgeguard.errors import ConfigError, EdgeGuardError, TrustError
from edgeguard.release.client import REPAIRED, FetchRequest, FetchResult, read_outcome, spawn_fetch
from firmware_bridge.slots import Slots

CHECK_S = 300.0
"""How long the check of a fetched model may take, in seconds."""
_GRACE_S = 10.0
"""How much longer than its own time-out a fetch may take before it is killed."""
_PAUSE_S, _BURST = 5.0, 3
"""Fetches for new hints are started this far apart, but for so many: who floods a device with hints costs it little."""
_RETRY_CAP = 32
"""The wait between attempts grows up to this many times the first one."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What became of a hint, as a Reported message says it."""

    state: Literal["fetching", "updated", "refused", "failed"]
    sequence: int
    reason: str = ""


class Updater:
    """Follows the newest hint. Time is passed in, in seconds of any steady clock.

    Args:
        config: the ``[update]`` section; None refuses every hint.
        folder: folder for the trusted metadata and for fetched files.
        examine: starts the check of a fetched file.
        known: sequence of the newest release that ever proved itself here, and digests of the files that failed here.
        spawn: starts a fetch.
        board: this board's name, which a release may ask for.
        runtime: name of the runtime, likewise.
    """

    def __init__(
        self,
        config: UpdateConfig | None,
        folder: Path,
        *,
        examine: Callable[[Fetched], subprocess.Popen[bytes]],
        known: Callable[[], tuple[int, tuple[str, ...]]] = lambda: (0, ()),
        spawn: Callable[[FetchRequest], subprocess.Popen[bytes]] = spawn_fetch,
        board: str = "",
        runtime: str = "",
    ) -> None:
        self._config = config
        self._folder = folder
        self._examine = examine
        self._known = known
        self._spawn = spawn
        self._board, self._runtime = board, runtime
        self._desired: Desired | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._fetched: Fetched | None = None
        """What the child at work checks; None while it fetches."""
        self._deadline = 0.0
        self._retry_at = 0.0
        self._paced_at = 0.0
        self._failures = 0

    def hint(self, hint: Hint, *, running_sequence: int, now_s: float) -> Progress | None:
        """Take a new hint, or that the last one was taken back. The broker's repetition of a known one changes nothing.

        Returns:
            What can be said at once, None while that is open.
        """
        desired = hint.desired
        if desired == self._desired and not hint.fresh:
            return None
        if desired != self._desired:
            self.close()
        if desired is None:
            self._desired = None
            return None
        self._desired, self._failures, self._retry_at = None, 0, max(now_s, self._paced_at - _BURST * _PAUSE_S)
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

    def step(
        self,
        *,
        model_digest: str,
        running_sequence: int,
        now_s: float,
    ) -> Progress | Fetched | None:
        """Start a fetch when one is due, or look at the child that runs. Never waits.

        Args:
            model_digest: of the model that runs.
            running_sequence: its release number.
            now_s: the time.

        Returns:
            A file that was fetched and checked, or what can be said; None while that is open.
        """
        if self._child is not None:
            return self._look(self._child, now_s)
        if self._config is None or self._desired is None or now_s < self._retry_at:
            return None
        sequence = self._desired.sequence
        self._paced_at = max(self._paced_at, now_s) + _PAUSE_S
        try:
            self._child = self._spawn(self._request(self._config, self._desired, model_digest, running_sequence))
        except EdgeGuardError as error:
            return self.defer(sequence, "failed", str(error), now_s=now_s)
        self._deadline = now_s + self._config.timeout_s + _GRACE_S
        # What became of an earlier attempt stays visible until this one has an outcome of its own.
        return None if self._failures else Progress(state="fetching", sequence=sequence)

    def _look(self, child: subprocess.Popen[bytes], now_s: float) -> Progress | Fetched | None:
        assert self._desired is not None
        sequence = self._desired.sequence
        found = read_outcome(child) if self._fetched is None else read_answer(child)
        if found is None and now_s < self._deadline:
            return None
        if found is None:
            what = "fetch" if self._fetched is None else "check of the fetched model"
            self.close()
            return self.defer(sequence, "failed", f"the {what} took too long", now_s=now_s)
        self._child, fetched = None, self._fetched
        self._fetched = None
        if isinstance(found, Answer):
            if found.state == "admitted":
                return fetched
        elif found.state == "fetched":
            return self._check(found, self._desired, now_s)
        elif found.state == "failed" and found.received:
            self._failures = 0
        return self.defer(sequence, found.state, found.reason, now_s=now_s)

    def _check(self, found: FetchResult, desired: Desired, now_s: float) -> Progress | None:
        """Start the check of what was fetched."""
        try:
            self._fetched = _described(found, repair=desired.target.startswith(REPAIRED))
            self._child = self._examine(self._fetched)
        except EdgeGuardError as error:
            self._fetched = None
            return self.defer(desired.sequence, "failed", str(error), now_s=now_s)
        self._deadline = now_s + CHECK_S
        return None

    def defer(self, sequence: int, state: Literal["refused", "failed"], reason: str, *, now_s: float) -> Progress:
        """The attempt at a release came to nothing: plan the next one, if that is still what is hinted at."""
        if self._config is not None and self._desired is not None and self._desired.sequence == sequence:
            first = self._config.retry_s
            self._retry_at = now_s + backoff(self._failures, first_s=first, cap_s=first * _RETRY_CAP)
            self._failures += 1
        return Progress(state=state, sequence=sequence, reason=reason[:500])

    def settle(self, sequence: int) -> None:
        """This release runs now; only a newer hint stays open, and what was begun against another model begins anew."""
        self.close()
        if self._desired is not None and self._desired.sequence <= sequence:
            self._desired = None

    def close(self) -> None:
        """Stop the child that runs."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = self._fetched = None

    def _request(self, config: UpdateConfig, desired: Desired, digest: str, sequence: int) -> FetchRequest:
        highest, failed = self._known()
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
            highest_sequence=highest,
            failed=failed,
            board=self._board,
            runtime=self._runtime,
            bytes_per_s=None if config.max_kib_per_s is None else config.max_kib_per_s << 10,
            compress=config.compress,
        )


def _described(found: FetchResult, *, repair: bool) -> Fetched:
    return Fetched(
        sequence=int(found.sequence or 0),
        path=Path(str(found.path)),
        file_digest=str(found.file_digest),
        model_digest=str(found.model_digest),
        guard_digest=str(found.guard_digest),
        sidecar=None if found.sidecar_path is None else Path(found.sidecar_path),
        sidecar_digest=found.sidecar_digest,
        repair=repair,
    )


def install(
    fetched: Fetched,
    slots: Slots,
    *,
    trial: Trial,
    load: Callable[[bytes], GuardedModel],
    anchor: str | None,
    sidecar_of: Callable[[GuardMetadata], Sidecar | None],
) -> Running:
    """Put a checked file in place, so that it runs from the next start on, and open it for this one.

    Args:
        fetched: what was fetched and admitted.
        slots: where it goes.
        trial: counts its starts.
        load: opens a model.
        anchor: digest of the sidecar that it was held against, where it is a repair.
        sidecar_of: finds the sidecar of a model.

    Raises:
        TrustError: the file or its sidecar changed since, or it is not new enough, or failed here before.
        ModelError: it does not load.
        ConfigError: the disk refuses.
    """
    slot = slots.active()
    if (slot.sha256, slot.sequence) != (fetched.file_digest, fetched.sequence):
        kept = None if fetched.sidecar is None else slots.keep(_read(fetched.sidecar))
        if kept != fetched.sidecar_digest:
            raise TrustError("fetched sidecar", got=f"SHA-256 {kept}", expected=fetched.sidecar_digest)
        slot = slots.stage(
            fetched.path,
            sha256=fetched.file_digest,
            sequence=fetched.sequence,
            sidecar=kept,
            anchor=anchor if fetched.repair else None,
        )
    # Else an earlier attempt put it in place, and the disk did not say so.
    model = load(slots.read(slot))
    trial.first(fetched.file_digest)
    slots.activate(slot)
    return Running(model=model, sidecar=sidecar_of(model.metadata), sequence=fetched.sequence)


def clear(fetched: Fetched) -> None:
    """Remove the fetched files. What stays is overwritten by the next fetch."""
    for path in (fetched.path, fetched.sidecar):
        if path is not None:
            with suppress(OSError):
                path.unlink()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"fetched file {path}", got=error.strerror, expected="a file that can be read") from error
