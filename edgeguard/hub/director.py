"""Moves the loop on: evidence to suspicion, suspicion to case, case to repair, repair to release, release to devices.

Rules enforced here:

* of several hubs on one database one decides at a time, by a lease; all run jobs;
* each step is taken by policy, or once a person approved it; long work is put into the database as a job;
* everything that it does follows from the database and the clock, step by step, so that a hub that was killed goes on
  where it stood: an unfinished job is run again, a release that was made but not recorded is found and recorded;
* evidence is looked at only when there is some that is new, and not more often than policy says.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from random import SystemRandom
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from edgeguard.contract import topics
from edgeguard.contract.guard import GuardMetadata
from edgeguard.contract.messages import Desired
from edgeguard.detection.metadata import read as read_metadata
from edgeguard.errors import EdgeGuardError, ModelError, TrustError
from edgeguard.hub import cases, evidence, policy, rollout
from edgeguard.hub import commands as questions
from edgeguard.hub.casebook import Casebook, Move, StaleError
from edgeguard.hub.cases import WORKING, Case, Choice, Dormant, Progress, Released, Result, State, Step
from edgeguard.hub.commands import Commands
from edgeguard.hub.config import HubConfig
from edgeguard.hub.drift import Finding
from edgeguard.hub.evidence import DeviceEvidence
from edgeguard.hub.ingest import Device, ModelShape
from edgeguard.hub.jobs import LEADER, Jobs, Lease, Runner, Sources, Work
from edgeguard.hub.listener import Listener
from edgeguard.hub.policy import Suspicion
from edgeguard.hub.store import Store
from edgeguard.hub.trust import Trust
from edgeguard.release.repository import Release, Repository

REPAIR = (sys.executable, "-m", "edgeguard.repair.case")
RENEW_S = 6 * 3600.0
PAUSE_AFTER_ERROR_S = 5.0
ASKED = 64
"""So many devices are asked for ranks or votes at most."""
RECALIBRATED = 64
"""So many devices are told to fit their guard anew at most, for each finding."""
LOOKING, FOLLOWING = 0.1, 0.02
"""The share of the time that looking at the evidence of a large fleet may take, and following its roll-outs."""
_DEFAULT_TEXT: Mapping[State, str] = {
    "confirmed": "the inspection confirmed a backdoor",
    "repairing": "the model is being repaired",
    "repaired": "the repaired model passed the gate",
}

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
        book: the records.
        commands: what is asked of devices.
        models: the models of the configuration.
        repository: signed releases, None where repaired models are not released.
        listener: publishes the hints.
        clock_ms: the hub's clock.
        owner: names this hub, the same after a restart.
        command: the repair worker's program and first arguments.
    """

    def __init__(
        self,
        config: HubConfig,
        *,
        store: Store,
        book: Casebook,
        commands: Commands,
        models: Mapping[str, Model],
        repository: Repository | None,
        listener: Listener,
        clock_ms: Callable[[], int],
        owner: str,
        command: Sequence[str] = REPAIR,
    ) -> None:
        self._config = config
        self._policy = config.policy
        self._store = store
        self._book = book
        self._commands = commands
        self._repository = repository
        self._listener = listener
        self._clock_ms = clock_ms
        self._lease = Lease(store, LEADER, owner=owner)
        self._jobs = Jobs(store, owner=owner)
        self._runner = Runner(
            self._jobs,
            folder=config.state_dir / "cases",
            command=command,
            sources=self._sources,
            said=self._said,
            attempts=config.policy.attempts,
            timeout_s=config.policy.worker_timeout_s,
        )
        self._published: dict[str, tuple[int, float]] = {}
        """The release that each device was last hinted at, and when on the monotonic clock."""
        self._connection = 0
        self._renew_at = time.monotonic()
        self._paused_until: dict[str, float] = {}
        self._assess_at = 0.0
        self._assessed: tuple[int, int] | None = None
        """How many reports and models there were at the last look at the evidence."""
        self._devices_at = 0.0
        self._unusable: set[tuple[int, int]] = set()
        self.models: dict[str, Model] = dict(models)
        self._adopt(book.all())

    def tick(self) -> None:
        """Do what is due. What fails is logged and tried again a little later, and keeps nothing else waiting."""
        for step in (self._lead, self._runner.tick):
            now_s = time.monotonic()
            if now_s < self._paused_until.get(step.__qualname__, 0.0):
                continue
            try:
                step(now_s)
            except StaleError:
                log.info("a case was moved by somebody else meanwhile; looking again")
            except (EdgeGuardError, SQLAlchemyError, OSError) as error:
                log.error("the loop pauses %g s: %s", PAUSE_AFTER_ERROR_S, error)  # noqa: TRY400
                self._paused_until[step.__qualname__] = time.monotonic() + PAUSE_AFTER_ERROR_S

    def stop(self) -> None:
        """End the worker and lay down the lead; another hub, or this one at its next start, goes on."""
        with suppress(SQLAlchemyError):
            self._runner.stop()
            self._lease.release()

    def _lead(self, now_s: float) -> None:
        known = self._book.all()
        self._adopt(known)
        if not self._lease.held(now_s):
            return
        if now_s >= self._assess_at:
            self._assess_news(known)
            self._assess_at = max(now_s + self._policy.assess_s, _rest_until(now_s, LOOKING))
            known = self._book.all()
        for case in known:
            try:
                self._advance(case)
            except StaleError:
                continue
            except (EdgeGuardError, OSError) as error:
                log.error("case %d waits: %s", case.id, error)  # noqa: TRY400 - the others do not
        self._roll_out_all(known, now_s)
        self._commands.tick()
        self._renew()

    # -- evidence to suspicion

    def _assess_news(self, known: Sequence[Case]) -> None:
        """Look at the evidence where reports came since the last look, whichever hub or worker stored them."""
        came = self._store.counts()["reports"], len(self.models)
        if came != self._assessed:
            self._assess(known)
            self._assessed = came

    def _assess(self, known: Sequence[Case]) -> None:
        devices = self._store.devices()
        epoch = self._store.epoch(self._clock_ms())
        for digest, model in self.models.items():
            counts = self._store.label_counts(digest, model.guard.guard_digest)
            watched = {one.device for one in devices if _runs(one, model)} | set(counts.devices)
            others = sum(one.model_digest == digest for one in devices if one.device not in watched)
            if others:
                text = f"{others} devices run {model.name} with a guard of their own: their counts are not judged"
                self._book.tell_daily("unwatched", model.name, text)
            if not counts.devices:
                continue
            trust = self._book.trust(digest)
            assessment = policy.assess(
                counts,
                self._policy,
                guard=model.guard,
                devices=len(watched),
                trust=trust,
                now_epoch=epoch,
            )
            now_ms = self._clock_ms()
            first = next((s for s in assessment.suspicions if cases.is_news(s, known, now_ms=now_ms)), None)
            if first is not None:
                self._suspect(model, first, trust)
            for finding in assessment.findings:
                self._tell(model, finding, devices)

    def _suspect(self, model: Model, suspicion: Suspicion, trust: Mapping[str, Trust]) -> None:
        devices = set(suspicion.devices)
        behind = [row for row in self._features(model, suspicion.label) if row.device in devices]
        weights = {device: known.weight for device, known in trust.items()}
        channels = policy.channels(behind, model.guard, self._policy.channels, weights=weights)
        names = model.guard.classes
        name = names[suspicion.label] if 0 <= suspicion.label < len(names) else ""
        case = cases.open_case(
            replace(suspicion, channels=channels), model=model.name, label_name=name, at_ms=self._clock_ms()
        )
        label = f"{case.label} ({name})" if name not in ("", str(case.label)) else f"{case.label}"
        self._save(Move(case=case, text=f"model {model.name}, label {label}: {suspicion.reason}"))

    def _features(self, model: Model, label: int) -> list[DeviceEvidence]:
        return self._store.label_features(model.guard.model_digest, model.guard.guard_digest, label)

    def _tell(self, model: Model, finding: Finding, devices: Sequence[Device]) -> None:
        """What has changed without pointing at a label: told, and where policy says so, answered."""
        subject = f"{model.name}, {finding.subject}"
        choice = self._policy.steps.recalibrate
        if not self._book.tell_daily(finding.kind, subject, f"{subject}: {finding.text}", {"model": model.name}):
            return
        if finding.kind != "drift" or choice == "never":
            return
        there = [d.device for d in devices if d.online and d.model_digest == model.guard.model_digest]
        site = finding.subject.removeprefix("site ")
        drifted = [d for d in there if finding.subject == "fleet" or d.rpartition("-")[0] == site]
        for device in drifted[:RECALIBRATED]:
            why = f"{finding.subject}: {finding.text}"
            self._commands.issue(device, "recalibrate", why=why, propose=choice == "approve", source="sidecar")

    # -- suspicion to repaired model

    def _advance(self, case: Case) -> None:
        """What the record's state asks for, as far as policy lets it."""
        if case.state in WORKING:
            self._follow(case)
        elif case.state == "suspected" and self._may(case, "inspect", self._policy.steps.inspect):
            self._inspect(case)
        elif case.state == "confirmed" and self._may(case, "repair", self._policy.steps.repair):
            self._repair(case)
        elif (
            case.state == "repaired"
            and self._repository is not None
            and self._may(case, "stage", self._policy.steps.stage)
        ):
            self._release(case, self._repository)

    def _may(self, case: Case, step: Step, choice: Choice) -> bool:
        allowed = cases.may(case, step, choice)
        now = self._clock_ms()
        if allowed is None and case.awaiting != step:
            asked = msgspec.structs.replace(case, awaiting=step, updated_ms=now)
            self._save(Move(case=asked, text=f"waits for a person to approve: {step}", kind="awaiting_approval"))
        note = f"policy.steps.{step} is never"
        if allowed is False and case.note != note:
            self._save(Move(case=msgspec.structs.replace(case, note=note, updated_ms=now), text=note, kind="held"))
        return bool(allowed)

    def _inspect(self, case: Case) -> None:
        steps = self._policy.steps
        whole = steps.repair == "auto" and steps.ask == "never"
        self._begin(case, "inspecting", f"inspecting model {case.model}", stop_after=None if whole else "inspect")

    def _repair(self, case: Case) -> None:
        steps = self._policy.steps
        if steps.ask != "never" and case.asked_ms is None:
            self._ask(case, steps.ask)
            return
        dormant: tuple[Dormant, ...] = ()
        if case.asked_ms is not None:
            asked = self._commands.of_case(case.id)
            late = self._clock_ms() >= case.asked_ms + self._policy.ask_s * 1000
            if not late and any(entry.state == "waiting" for entry in asked):
                return
            model = self.models.get(case.model_digest)
            dormant = questions.dormant(model.guard, asked) if model else ()
        text = f"repairing model {case.model}" + (" with the fleet's answers" if dormant else "")
        self._begin(case, "repairing", text, dormant=dormant, after=case.job)

    def _ask(self, case: Case, how: Literal["ranks", "votes"]) -> None:
        """Ask some of the devices that run the model; drawn at random, so that nobody can see to being asked."""
        model = self.models.get(case.model_digest)
        there = [d.device for d in self._store.devices() if d.online and d.model_digest == case.model_digest]
        drawn = SystemRandom().sample(there, min(len(there), ASKED))
        asked = msgspec.structs.replace(case, asked_ms=self._clock_ms(), updated_ms=self._clock_ms())
        self._save(Move(case=asked, text=f"asks {len(drawn)} devices for {how}", kind="asked"))
        for device in drawn:
            for name, fields in questions.questions(model.guard, how) if model else ():
                self._commands.issue(device, name, case=case.id, expires_s=max(1.0, self._policy.ask_s), **fields)

    def _begin(self, case: Case, state: State, text: str, **what: Any) -> None:
        """Put the job for an inspection or repair into the database, where what it needs is there."""
        model = self.models.get(case.model_digest)
        if model is None or model.keras is None:
            self._give_up(case, "the hub has no trainable form of this model: name it under [[models]]")
            return
        rows, behind = self._features(model, case.label), set(case.devices)
        if not rows:
            # The model was calibrated anew while the case was open: what was counted belongs to its earlier guard.
            self._give_up(case, "no evidence for this label under the guard that the model has now")
            return
        mine = evidence.pool_label(
            [row for row in rows if row.device in behind] or rows,  # others see no trigger, and would hide its channels
            model_digest=case.model_digest,
            width=model.guard.feature_count,
            share=self._policy.device_share,
            weights={device: known.weight for device, known in self._book.trust(case.model_digest).items()},
        )
        work = Work(
            case=case.id,
            model_digest=case.model_digest,
            guard_digest=model.guard.guard_digest,
            label=case.label,
            channels=tuple(channel.index for channel in case.channels),
            flagged_mean=tuple(mine.flagged_mean.tolist()),
            unflagged_mean=tuple(mine.unflagged_mean.tolist()),
            unflagged_std=tuple(mine.unflagged_std.tolist()),
            **what,
        )
        judged = sum(row.flagged for row in rows if row.device in case.devices)
        moved = cases.move(case, state, at_ms=self._clock_ms(), judged=judged)
        self._save(
            Move(case=moved, text=text),
            also=lambda db, written: msgspec.structs.replace(written, job=self._jobs.add(db, work)),
        )

    def _follow(self, case: Case) -> None:
        """Move the case as far as its job is."""
        entry = self._jobs.get(case.job) if case.job is not None else None
        now = self._clock_ms()
        if entry is None:
            self._give_up(case, "its job is gone")
        elif entry.state == "failed":
            self._give_up(case, entry.reason)
        elif entry.result is not None:
            moves = cases.settled(case, entry.result, at_ms=now)
            self._save(*(Move(case=moved, text=moved.note or _DEFAULT_TEXT[moved.state]) for moved in moves))
        elif entry.progress is not None:
            moves = cases.progressed(case, entry.progress, at_ms=now)
            if moves:
                self._save(*(Move(case=moved, text=_DEFAULT_TEXT[moved.state]) for moved in moves))

    def _give_up(self, case: Case, note: str) -> None:
        self._save(Move(case=cases.move(case, "could_not_check", at_ms=self._clock_ms(), note=note), text=note))

    def _sources(self) -> dict[str, Sources]:
        """What this hub can work on."""
        return {
            digest: Sources(
                guard_digest=model.guard.guard_digest, guarded=str(model.guarded), keras=model.keras, data=model.data
            )
            for digest, model in self.models.items()
            if model.keras is not None
        }

    def _said(self, case: int, word: Progress) -> None:
        """The worker came to its next step. Not told to anybody but the timeline."""
        detail = {"case": case, "stage": word.stage}
        self._book.tell("progress", f"case {case}", word.text or word.stage, detail)

    # -- repaired model to fleet

    def _release(self, case: Case, repository: Repository) -> None:
        assert case.result is not None
        now = self._clock_ms()
        try:
            content = self._check_output(case, case.result)
        except (ModelError, TrustError) as error:
            self._save(Move(case=cases.move(case, "refused", at_ms=now, note=str(error)), text=str(error)))
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
        moved = cases.move(case, "released", at_ms=now, release=released)
        self._save(Move(case=moved, text=f"release {release.sequence}, {release.target}, signed"))

    def _check_output(self, case: Case, result: Result) -> bytes:
        """The repaired file, which must say of itself what the worker said of it."""
        content = self._jobs.file(case.job, "output") if case.job is not None else None
        if content is None:
            raise ModelError(f"repaired model of case {case.id}", got="no file", expected="the worker's output")
        guard = read_metadata(content)
        if (guard.model_digest, guard.guard_digest) != (result.model_digest, result.guard_digest):
            raise TrustError(
                f"repaired model {result.output}", got=f"model {guard.model_digest}", expected=result.model_digest
            )
        return content

    def _roll_out_all(self, known: Sequence[Case], now_s: float) -> None:
        rolling = [case for case in known if case.state in ("released", "rolling_out", "closed") and case.release]
        if not rolling or now_s < self._devices_at:
            return
        began_s = time.monotonic()
        devices = self._store.devices()
        self._devices_at = _rest_until(began_s, FOLLOWING)
        for case in rolling:
            assert case.release is not None
            with suppress(StaleError):
                self._roll_out(case, case.release, devices)

    def _roll_out(self, case: Case, release: Released, devices: Sequence[Device]) -> None:
        now = self._clock_ms()
        plan = rollout.next_hints(devices, release, self._config.policy, now)
        after = msgspec.structs.replace(
            release, canaries=plan.canaries, everyone=plan.everyone, updated=plan.updated, held=plan.held
        )
        changed = msgspec.structs.replace(case, release=after, updated_ms=now)
        if case.state == "released" and plan.hints:
            moved = cases.move(case, "rolling_out", at_ms=now, release=after)
            self._save(Move(case=moved, text=f"release {release.sequence} goes to {', '.join(plan.canaries)} first"))
        elif case.state == "rolling_out" and plan.done:
            moved = cases.move(case, "closed", at_ms=now, release=after)
            self._save(Move(case=moved, text=f"release {release.sequence} runs on {len(plan.updated)} devices"))
        elif case.state != "released" and after != release:
            if plan.everyone and not release.everyone:
                self._save(Move(case=changed, text=f"release {release.sequence} goes to the whole fleet"))
            else:
                self._book.note(changed)
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

    def _adopt(self, known: Sequence[Case]) -> None:
        """Watch the repaired model of each release like any other; its files may come from another hub's job."""
        for case in known:
            if case.release is None or case.result is None or case.release.model_digest in self.models:
                continue
            if (case.id, case.release.sequence) in self._unusable or case.job is None:
                continue
            try:
                guarded, keras = self._files(case, case.job)
                _, guard = read_model(guarded)
            except (ModelError, OSError) as error:
                log.error("a released model is not watched: %s", error)  # noqa: TRY400
                self._unusable.add((case.id, case.release.sequence))
                continue
            before = self.models.get(case.model_digest)
            self.models[guard.model_digest] = Model(
                name=case.model,
                guarded=guarded,
                keras=str(keras) if keras.exists() else None,
                data=before.data if before else "",
                guard=guard,
            )

    def _files(self, case: Case, job: int) -> tuple[Path, Path]:
        """The repaired model and its trainable form as files of this hub."""
        folder = self._config.state_dir / "models" / str(case.id)
        paths = folder / "repaired.tflite", folder / "repaired.keras"
        names: tuple[Literal["output", "trainable"], ...] = ("output", "trainable")
        for path, name in zip(paths, names, strict=True):
            content = None if path.exists() else self._jobs.file(job, name)
            if content is not None:
                folder.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{path.name}.tmp")
                temporary.write_bytes(content)
                temporary.replace(path)
        return paths

    def _renew(self) -> None:
        if self._repository is not None and time.monotonic() >= self._renew_at:
            self._repository.renew()
            self._renew_at = time.monotonic() + RENEW_S

    def _save(self, *moves: Move, also: Callable[[Connection, Case], Case] | None = None) -> Case:
        case = self._book.save(*moves, also=also)
        for move in moves:
            log.info("case %d, %s: %s", case.id, move.kind or move.case.state, move.text)
        return case


def _rest_until(began_s: float, share: float) -> float:
    """When to do again what has just ended, so that it takes no more than this share of the time."""
    now_s = time.monotonic()
    return now_s + (now_s - began_s) / share


def _runs(device: Device, model: Model) -> bool:
    return (device.model_digest, device.guard_digest) == (model.guard.model_digest, model.guard.guard_digest)


def _made_before(repository: Repository, case: Case, content: bytes) -> Release | None:
    """The release of this very file, where the hub was killed between making and recording it."""
    digest = sha256(content).hexdigest()
    return next((r for r in repository.releases() if r.file_digest == digest and r.replaces == case.model_digest), None)
