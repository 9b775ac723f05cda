"""Moves the loop on: evidence to suspicion, suspicion to case, case to repair, repair to release, release to devices.

Everything that it does follows from the database and the clock, step by step, so that a hub that was killed goes on
where it stood: an unfinished repair is run again, a release that was made but not recorded is found and recorded.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from edgeguard.contract import topics
from edgeguard.contract.guard import GuardMetadata
from edgeguard.contract.messages import Desired
from edgeguard.detection.metadata import read as read_metadata
from edgeguard.errors import EdgeGuardError, ModelError, TrustError
from edgeguard.hub import cases, evidence, policy, rollout
from edgeguard.hub.cases import WORKING, Case, Job, Progress, Released, Result
from edgeguard.hub.config import HubConfig
from edgeguard.hub.ingest import Device, ModelShape
from edgeguard.hub.listener import Listener
from edgeguard.hub.store import Store
from edgeguard.hub.worker import Failed, Worker, finished, read_output
from edgeguard.release.repository import Release, Repository

REPAIR = (sys.executable, "-m", "edgeguard.repair.case")
RENEW_S = 6 * 3600.0
PAUSE_AFTER_ERROR_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the fleet: one that was configured, or a repaired one that was released."""

    name: str
    guarded: Path
    keras: str | None
    data: str
    guard: GuardMetadata

    @property
    def shape(self) -> ModelShape:
        """What its reports look like."""
        return ModelShape(width=self.guard.feature_count, classes=len(self.guard.classes))


def read_model(path: Path) -> tuple[bytes, GuardMetadata]:
    """A guarded file and its metadata.

    Raises:
        ModelError: it cannot be read or is not guarded; the message names the file.
    """
    try:
        content = path.read_bytes()
        return content, read_metadata(content)
    except OSError as error:
        raise ModelError(f"guarded model {path}", got=error.strerror, expected="a readable file") from error
    except ModelError as error:
        raise ModelError(f"guarded model {path}", got=error.got, expected=error.expected, do=error.do) from error


def configured(config: HubConfig) -> dict[str, Model]:
    """The models of the configuration, by model digest. Raises ModelError."""
    found: dict[str, Model] = {}
    for entry in config.models:
        _, guard = read_model(entry.guarded)
        found[guard.model_digest] = Model(
            name=entry.name, guarded=entry.guarded, keras=str(entry.keras), data=entry.data, guard=guard
        )
    return found


class Director:
    """One step of the loop at each :meth:`tick`, from one thread.

    Args:
        config: the hub's configuration.
        store: the database.
        models: the models of the configuration.
        repository: signed releases, None where repaired models are not released.
        listener: publishes the hints.
        clock_ms: the hub's clock.
        command: the repair worker's program and first arguments.
    """

    def __init__(
        self,
        config: HubConfig,
        *,
        store: Store,
        models: Mapping[str, Model],
        repository: Repository | None,
        listener: Listener,
        clock_ms: Callable[[], int],
        command: Sequence[str] = REPAIR,
    ) -> None:
        self._config = config
        self._store = store
        self._repository = repository
        self._listener = listener
        self._clock_ms = clock_ms
        self._command = command
        self._worker: tuple[int, Worker] | None = None
        self._published: dict[str, tuple[int, float]] = {}
        """The release that each device was last hinted at, and when on the monotonic clock."""
        self._connection = 0
        self._renew_at = time.monotonic()
        self._paused_until = 0.0
        self._news = True
        self.models: dict[str, Model] = dict(models)
        for case in store.cases():
            self._adopt(case)

    def tick(self) -> None:
        """Do what is due. A failure is logged and everything is tried again a little later."""
        if time.monotonic() < self._paused_until:
            return
        try:
            known = self._store.cases()
            self._watch_worker(known)
            if self._news:
                self._news = False
                self._assess(known)
            devices = self._store.devices()
            for case in self._store.cases():
                self._advance(case, devices)
            self._renew()
        except (EdgeGuardError, SQLAlchemyError, OSError) as error:
            log.error("the loop pauses %g s: %s", PAUSE_AFTER_ERROR_S, error)  # noqa: TRY400
            self._paused_until = time.monotonic() + PAUSE_AFTER_ERROR_S
            self._news = True

    def notice(self) -> None:
        """There is new evidence. May be called from any thread."""
        self._news = True

    def stop(self) -> None:
        """End the repair worker; its case is taken up again at the next start."""
        if self._worker is not None:
            self._worker[1].stop()
            self._worker = None

    # -- evidence to case

    def _assess(self, known: Sequence[Case]) -> None:
        for digest, model in self.models.items():
            rows = self._store.evidence(digest, model.guard.guard_digest)
            if not rows:
                continue
            suspicions = policy.assess(
                self._pool(model, rows),
                self._config.policy,
                fpr_upper=model.guard.fpr_upper,
                fpr=model.guard.fpr,
                taps=model.guard.taps,
                devices=sum(device.model_digest == digest for device in self._store.devices()),
            )
            first = next((s for s in suspicions if cases.is_news(s, known)), None)
            if first is not None:
                case = cases.open_case(first, model=model.name, at_ms=self._clock_ms())
                text = (
                    f"model {model.name}, label {_label(model, first.label)}: {first.flagged} of {first.inputs} inputs "
                    f"flagged on {len(first.devices)} devices (p = {first.p_value:.1e})"
                    + ("" if first.calibrated else ", calibration never saw this class, or hardly")
                )
                self._save(case, "suspected", text)

    def _pool(self, model: Model, rows: Sequence[evidence.DeviceEvidence]) -> tuple[evidence.LabelEvidence, ...]:
        return evidence.pool(
            rows,
            model_digest=model.guard.model_digest,
            width=model.guard.feature_count,
            share=self._config.policy.device_share,
        )

    # -- case to repaired model

    def _watch_worker(self, known: Sequence[Case]) -> None:
        if self._worker is None:
            case = next((c for c in known if c.state in WORKING), None)
            if case is not None:
                self._take_up(case)
            return
        number, worker = self._worker
        case = next(c for c in known if c.id == number)
        heard = worker.poll(time.monotonic())
        for said, after in zip_longest(heard, heard[1:]):
            if isinstance(said, Progress):
                if isinstance(after, Progress) and (said.stage, said.text) == (after.stage, after.text):
                    continue
                case = self._note_progress(case, said)
            else:
                self._worker = None
                self._end_of_run(case, said)

    def _take_up(self, case: Case) -> None:
        """Take the result of a run that finished while the hub was away, else start the next run."""
        result = finished(self._folder(case)) if case.runs else None
        if result is not None:
            self._end_of_run(case, result)
            return
        model = self.models.get(case.model_digest)
        if model is None or model.keras is None:
            note = "the hub has no trainable form of this model: name it under [[models]]"
            self._save(cases.move(case, "could_not_check", at_ms=self._clock_ms(), note=note), "could_not_check", note)
            return
        rows = self._store.evidence(case.model_digest, model.guard.guard_digest)
        mine = next((item for item in self._pool(model, rows) if item.label == case.label), None)
        if mine is None:
            # The model was calibrated anew while the case was open: what was counted belongs to its earlier guard.
            note = "no evidence for this label under the guard that the model has now"
            self._save(cases.move(case, "could_not_check", at_ms=self._clock_ms(), note=note), "could_not_check", note)
            return
        # Counted before it starts: a folder is never used twice, even when the hub is killed in between.
        case = cases.started(case, judged=mine.flagged, at_ms=self._clock_ms())
        case = self._save(case, "confirming", f"inspecting model {model.name}")
        job = Job(
            guarded=str(model.guarded),
            keras=model.keras,
            data=model.data,
            label=case.label,
            flagged_mean=tuple(mine.flagged_mean.tolist()),
            unflagged_mean=tuple(mine.unflagged_mean.tolist()),
            unflagged_std=tuple(mine.unflagged_std.tolist()),
            out_dir=str(self._folder(case)),
            seed=case.id,
        )
        deadline_s = time.monotonic() + self._config.policy.worker_timeout_s
        self._worker = (case.id, Worker(self._command, job, deadline_s=deadline_s))

    def _note_progress(self, case: Case, said: Progress) -> Case:
        before = case.progress
        moved = cases.progressed(case, said, at_ms=self._clock_ms())
        if before is not None and (before.stage, before.text) == (said.stage, said.text):
            return self._store.save(moved)
        return self._save(moved, said.stage, said.text or said.stage)

    def _end_of_run(self, case: Case, said: Result | Failed) -> None:
        now = self._clock_ms()
        if isinstance(said, Failed):
            if said.final:
                case = cases.move(case, "could_not_check", at_ms=now, progress=None, note=said.reason)
            else:
                case = cases.crashed(case, said.reason, attempts=self._config.policy.attempts, at_ms=now)
            kind = "could_not_check" if case.state == "could_not_check" else "worker_failed"
            self._save(case, kind, case.note)
            return
        case = cases.settled(case, said, at_ms=now)
        self._save(case, case.state, case.note or "the repaired model passed the gate")

    # -- repaired model to fleet

    def _advance(self, case: Case, devices: Sequence[Device]) -> None:
        if case.state == "repaired" and self._repository is not None:
            self._release(case, self._repository)
        elif case.state in ("released", "rolling_out", "closed") and case.release is not None:
            self._roll_out(case, case.release, devices)

    def _release(self, case: Case, repository: Repository) -> None:
        assert case.result is not None
        now = self._clock_ms()
        try:
            content = self._check_output(case, case.result)
        except (ModelError, TrustError) as error:
            self._save(cases.move(case, "refused", at_ms=now, note=str(error)), "refused", str(error))
            return
        release = _made_before(repository, case, content) or repository.add(
            content,
            name=case.model,
            model_digest=case.result.model_digest or "",
            guard_digest=case.result.guard_digest or "",
            replaces=case.model_digest,
        )
        released = Released(
            target=release.target,
            sequence=release.sequence,
            model_digest=release.model_digest,
            guard_digest=release.guard_digest,
            replaces=case.model_digest,
            at_ms=now,
        )
        case = self._save(
            cases.move(case, "released", at_ms=now, release=released),
            "released",
            f"release {release.sequence}, {release.target}, signed",
        )
        self._adopt(case)

    def _check_output(self, case: Case, result: Result) -> bytes:
        """The repaired file, which must say of itself what the worker said of it."""
        content = read_output(result, self._folder(case))
        guard = read_metadata(content)
        if (guard.model_digest, guard.guard_digest) != (result.model_digest, result.guard_digest):
            raise TrustError(
                f"repaired model {result.output}", got=f"model {guard.model_digest}", expected=result.model_digest
            )
        return content

    def _roll_out(self, case: Case, release: Released, devices: Sequence[Device]) -> None:
        now = self._clock_ms()
        if case.state == "released" and self._veto(case).exists():
            note = "an operator objected to the release"
            self._save(cases.move(case, "refused", at_ms=now, note=note), "refused", note)
            return
        plan = rollout.next_hints(devices, release, self._config.policy, now)
        after = msgspec.structs.replace(
            release, canaries=plan.canaries, everyone=plan.everyone, updated=plan.updated, held=plan.held
        )
        if case.state == "released" and plan.hints:
            case = cases.move(case, "rolling_out", at_ms=now, release=after)
            self._save(case, "rolling_out", f"release {release.sequence} goes to {', '.join(plan.canaries)} first")
        elif case.state == "rolling_out" and plan.done:
            case = cases.move(case, "closed", at_ms=now, release=after)
            self._save(case, "closed", f"release {release.sequence} runs on {len(plan.updated)} devices")
        elif case.state != "released" and after != release:
            moved = cases.move(case, case.state, at_ms=now, release=after)
            if plan.everyone and not release.everyone:
                self._save(moved, "rolling_out", f"release {release.sequence} goes to the whole fleet")
            else:
                self._store.save(moved)
        # Recorded first: a canary that was hinted must be known as one after a restart.
        self._publish([device for device in devices if device.device in plan.hints], release)

    def _publish(self, hinted: Sequence[Device], release: Released) -> None:
        """Publish hints that do not stand yet, or that their device shows no sign of.

        A broker may forget what is retained: each connection begins anew.
        """
        if self._listener.connections != self._connection:
            self._connection = self._listener.connections
            self._published.clear()
        desired, now_s = Desired(target=release.target, sequence=release.sequence), time.monotonic()
        for device in hinted:
            sequence, at_s = self._published.get(device.device, (None, 0.0))
            due = sequence != release.sequence or now_s - at_s >= rollout.repeat_after_s(device, release)
            if due and self._listener.publish(device.device, topics.MODEL_DESIRED, desired, retain=True):
                self._published[device.device] = (release.sequence, now_s)

    def _adopt(self, case: Case) -> None:
        """Watch the repaired model of a release like any other."""
        if case.release is None or case.result is None or case.release.model_digest in self.models:
            return
        path = self._folder(case) / (case.result.output or "")
        before = self.models.get(case.model_digest)
        try:
            _, guard = read_model(path)
        except ModelError as error:
            log.error("a released model is not watched: %s", error)  # noqa: TRY400
            return
        self.models[guard.model_digest] = Model(
            name=case.model,
            guarded=path,
            keras=str(self._folder(case) / case.result.keras) if case.result.keras else None,
            data=before.data if before else "",
            guard=guard,
        )

    def _renew(self) -> None:
        if self._repository is not None and time.monotonic() >= self._renew_at:
            self._repository.renew()
            self._renew_at = time.monotonic() + RENEW_S

    def _save(self, case: Case, kind: str, text: str) -> Case:
        case = self._store.save(case, (kind, text))
        log.info("case %d, %s: %s", case.id, kind, text)
        return case

    def _folder(self, case: Case) -> Path:
        return self._config.state_dir / "cases" / str(case.id) / f"run-{case.runs}"

    def _veto(self, case: Case) -> Path:
        """An operator objects by making this file."""
        return self._config.state_dir / "veto" / str(case.id)


def _made_before(repository: Repository, case: Case, content: bytes) -> Release | None:
    """The release of this very file, where the hub was killed between making and recording it."""
    digest = sha256(content).hexdigest()
    return next((r for r in repository.releases() if r.file_digest == digest and r.replaces == case.model_digest), None)


def _label(model: Model, label: int) -> str:
    names = model.guard.classes
    return f"{label} ({names[label]})" if 0 <= label < len(names) and names[label] != str(label) else str(label)
