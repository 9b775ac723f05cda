"""Moves the loop on: evidence to suspicion, suspicion to case, case to repair, repair to release, release to devices.

Rules enforced here:

* of several hubs on one database one decides at a time, by a lease; all run jobs;
* each step is taken by policy, or once a person approved it; long work is put into the database as a job;
* everything that it does follows from the database and the clock, step by step, so that a hub that was killed goes on
  where it stood: an unfinished job is run again, a release that was made but not recorded is found and recorded;
* of a private model nothing is inspected, repaired or asked of devices here. Its case waits for what three parties
  found, and then for a release that its owner signed;
* a roll-out that ended leaves no hint behind: whoever was away returns to no model that the fleet has left;
* evidence is looked at only when there is some that is new, and not more often than policy says.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import SystemRandom
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from edgeguard.contract import topics
from edgeguard.contract.guard import GuardMetadata
from edgeguard.contract.messages import Desired
from edgeguard.detection import sidecar
from edgeguard.detection.metadata import read as read_metadata
from edgeguard.detection.statistics import SLACK
from edgeguard.errors import EdgeGuardError, ModelError, TrustError
from edgeguard.hub import cases, policy, rollout
from edgeguard.hub import commands as questions
from edgeguard.hub.casebook import Casebook, Move, StaleError
from edgeguard.hub.cases import WORKING, Case, Choice, Dormant, Progress, Released, Result, State, Step
from edgeguard.hub.commands import Commands
from edgeguard.hub.config import HubConfig
from edgeguard.hub.drift import Finding
from edgeguard.hub.evidence import DeviceEvidence
from edgeguard.hub.ingest import Device, ModelShape
from edgeguard.hub.jobs import LEADER, FileName, Jobs, Lease, Runner, Sources, Work
from edgeguard.hub.listener import Listener
from edgeguard.hub.members import Members
from edgeguard.hub.policy import ChannelShift, Suspicion
from edgeguard.hub.shared import Shared
from edgeguard.hub.store import Store
from edgeguard.hub.trust import Trust
from edgeguard.release.client import REPAIRED
from edgeguard.release.repository import Repository
from edgeguard.release.roles import Release

REPAIR = (sys.executable, "-m", "edgeguard.repair.case")
RENEW_S = 6 * 3600.0
PAUSE_AFTER_ERROR_S = 5.0
ASKED = 64
"""So many devices are asked for ranks or votes at most."""
RECALIBRATED = 64
"""So many devices are told to fit their guard anew at most, for each finding."""
LOOKING, FOLLOWING = 0.1, 0.1
"""The share of the time that looking at the evidence of a large fleet may take, and following its roll-outs."""
_SIGNATURE = "a second, offline signature: edgeguard release sign"
_NOTHING = 0
"""In place of a release's number: no hint stands."""
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
    private: bool = False

    @property
    def shape(self) -> ModelShape:
        """What its reports look like."""
        return ModelShape(width=self.guard.feature_count, classes=len(self.guard.classes), private=self.private)


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
            name=entry.name,
            guarded=entry.guarded,
            keras=None if entry.keras is None else str(entry.keras),
            data=entry.data or "",
            guard=guard,
            private=entry.private,
        )
    return found


@dataclass
class _Course:
    """Where the fleet is going.

    ``hints`` by device; ``withdrawn`` may have one that shall not stand; ``settled`` are the releases that are through,
    and those that bring an earlier model back, with their cases.
    """

    hints: dict[str, Released] = field(default_factory=dict)
    withdrawn: set[str] = field(default_factory=set)
    settled: list[tuple[Case, Released]] = field(default_factory=list)


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
        self.shared = Shared(
            store, book, folder=config.state_dir / "shared", models=lambda: self.models, clock_ms=clock_ms
        )
        self._runner = Runner(
            self._jobs,
            folder=config.state_dir / "cases",
            command=command,
            sources=self._sources,
            said=self._said,
            attempts=config.policy.attempts,
            timeout_s=config.policy.worker_timeout_s,
            shared=self.shared.bundle,
        )
        self._members = Members(store)
        self._ended: dict[int, frozenset[str]] = {}
        self._direct: dict[tuple[str, str], Released] = {}
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
        looks = now_s >= self._assess_at
        if looks:
            self._assess_news(known)
            self._assess_at = max(now_s + self._policy.assess_s, _rest_until(now_s, LOOKING))
            known = self._book.all()
        for case in known:
            try:
                self._advance(case, looks=looks)
            except StaleError:
                continue
            except (EdgeGuardError, OSError) as error:
                log.error("case %d waits: %s", case.id, error)  # noqa: TRY400 - the others do not
        self.shared.reconsider(known)
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
            watched = {one.device for one in devices if one.model_digest == digest} | set(counts.devices)
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
        channels: tuple[ChannelShift, ...] = ()
        if not model.private:
            devices = set(suspicion.devices)
            behind = [row for row in self._features(model, suspicion.label) if row.device in devices]
            weights = {device: known.weight for device, known in trust.items()}
            channels = policy.channels(behind, model.guard, self._policy.channels, weights=weights)
        names = model.guard.classes
        name = names[suspicion.label] if 0 <= suspicion.label < len(names) else ""
        case = cases.open_case(
            replace(suspicion, channels=channels),
            model=model.name,
            label_name=name,
            at_ms=self._clock_ms(),
            private=model.private,
        )
        label = f"{case.label} ({name})" if name not in ("", str(case.label)) else f"{case.label}"
        self._save(Move(case=case, text=f"model {model.name}, label {label}: {suspicion.reason}"))

    def _features(self, model: Model, label: int) -> list[DeviceEvidence]:
        """The newest that are enough: what guided an inspection long ago may have been something else."""
        guard, enough = model.guard, self._policy.min_flagged
        return self._store.label_features(guard.model_digest, guard.guard_digest, label, enough=enough)

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

    def _advance(self, case: Case, *, looks: bool) -> None:
        """What the record's state asks for, as far as policy lets it; ``looks``: also what is dear to look at."""
        case = self._as_configured(case)
        if case.private:
            self._advance_private(case, looks=looks)
        elif case.state in WORKING:
            self._follow(case)
        elif case.state == "suspected" and self._may(case, "inspect", self._policy.steps.inspect):
            self._inspect(case)
        elif case.state == "confirmed" and self._may(case, "repair", self._policy.steps.repair):
            self._repair(case)
        elif (
            case.state == "repaired" and self._repository is not None and self._may(case, "stage", self._staging(case))
        ):
            self._release(case, self._repository)

    def _as_configured(self, case: Case) -> Case:
        """The record with the present word on whether its model is private; steps that waited begin anew."""
        model = self.models.get(case.model_digest)
        undecided = case.state in ("suspected", "confirmed", *WORKING)
        if model is None or model.private == case.private or not undecided:
            return case
        text = f"model {case.model} is {'private now' if model.private else 'no longer private'}"
        channels = () if model.private else case.channels
        now = self._clock_ms()
        changed = msgspec.structs.replace(
            case, private=model.private, channels=channels, awaiting=None, note="", updated_ms=now
        )
        return self._save(Move(case=changed, text=text, kind="held"))

    def _advance_private(self, case: Case, *, looks: bool) -> None:
        """The same for a private model: what three parties and its owner do is waited for."""
        if case.state in WORKING:
            self._give_up(case, "the model became private meanwhile: what was begun in clear is not finished")
        elif case.state == "suspected" and case.awaiting is None:
            asked = msgspec.structs.replace(case, awaiting="inspect", updated_ms=self._clock_ms())
            self._save(Move(case=asked, text="waits for a private inspection", kind="awaiting_approval"))
        elif case.state == "confirmed" and looks:
            made = self._signed_by_owner(case)
            if made is not None:
                text = f"release {made.sequence}, {made.target}, that the model's owner signed replaces it"
                self._save(Move(case=cases.move(case, "repaired", at_ms=self._clock_ms(), note=""), text=text))
        elif case.state == "repaired" and self._may(case, "stage", self._policy.steps.stage):
            made = self._signed_by_owner(case)
            if made is None:
                self._wait_for(case, "the owner's release is not published any more")
                return
            now = self._clock_ms()
            moved = cases.move(case, "released", at_ms=now, release=_released(made, at_ms=now))
            self._save(Move(case=moved, text=f"release {made.sequence}, {made.target}, is the owner's"))

    def _signed_by_owner(self, case: Case) -> Release | None:
        """The newest release that was signed offline and replaces a case's model."""
        releases = self._repository.releases() if self._repository is not None else ()
        owners = [one for one in releases if one.replaces == case.model_digest and not one.target.startswith(REPAIRED)]
        return owners[-1] if owners else None

    def _staging(self, case: Case) -> Choice:
        """Policy's choice, also where the gate could not check every rule: a person's unless policy accepts that."""
        steps = self._policy.steps
        unchecked = case.result is not None and case.result.needs_approval
        return steps.unchecked if unchecked and steps.stage == "auto" else steps.stage

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
        mine = self._book.evidence(case, model.guard, self._policy)
        if mine is None:
            # The model was calibrated anew while the case was open: what was counted belongs to its earlier guard.
            self._give_up(case, "no evidence for this label under the guard that the model has now")
            return
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
        judged = sum(count.flagged for count in mine.per_device if count.device in case.devices)
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
            if model.keras is not None and not model.private
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
        made = repository.add_repair(
            content,
            name=case.model,
            model_digest=case.result.model_digest or "",
            guard_digest=case.result.guard_digest or "",
            replaces=case.model_digest,
            sidecar=None if case.job is None else self._jobs.file(case.job, "sidecar"),
        )
        if made.published:
            moved = cases.move(case, "released", at_ms=now, release=_released(made, at_ms=now))
            self._save(Move(case=moved, text=f"release {made.sequence}, {made.target}, signed"))
        else:
            self._wait_for(case, f"release {made.sequence} waits for {_SIGNATURE}", kind="awaiting_approval")

    def _wait_for(self, case: Case, note: str, *, kind: str = "held") -> None:
        """Say once what a record waits for."""
        if case.note != note:
            noted = msgspec.structs.replace(case, note=note, updated_ms=self._clock_ms())
            self._save(Move(case=noted, text=note, kind=kind))

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
        out = [(case, case.release) for case in known if case.release is not None and case.state != "refused"]
        if not out or now_s < self._devices_at:
            return
        began_s = time.monotonic()
        devices = self._store.devices()
        course = _Course()
        for case, release in out:
            try:
                self._roll_out(case, release, devices, course)
            except StaleError:
                return  # what was decided on it is not known here yet
            except (EdgeGuardError, OSError) as error:
                log.error("the roll-out of case %d waits: %s", case.id, error)  # noqa: TRY400 - the others do not
        for device in devices:
            if device.model_digest is not None and device.device not in course.hints:
                ahead = rollout.way(device.model_digest, [release for _, release in course.settled])
                if ahead:
                    course.hints[device.device] = self._shortest(ahead, course)
        # Recorded first: who was offered a release must be known after a restart.
        self._publish(devices, course)
        self._devices_at = _rest_until(began_s, FOLLOWING)

    def _roll_out(self, case: Case, release: Released, devices: Sequence[Device], course: _Course) -> None:
        if case.state in ("released", "rolling_out"):
            self._step(case, release, devices, course)
        elif case.state == "closed":
            course.settled.append((case, release))
            updated = tuple(sorted(device.device for device in devices if rollout.has(device, release)))
            if updated != release.updated:
                self._book.note(
                    msgspec.structs.replace(case, release=msgspec.structs.replace(release, updated=updated))
                )
        else:
            # Those that were hinted after the roll-out, or back, were offered nothing by it.
            either = (release.replaces, release.model_digest)
            course.withdrawn |= self._offered(case) | {d.device for d in devices if d.model_digest in either}
            if case.state in ("rolling_back", "rolled_back"):
                case = self._take_back(case, release, devices)
            if case.back is not None and case.state in ("rolling_back", "rolled_back"):
                course.settled.append((case, case.back))

    def _step(self, case: Case, release: Released, devices: Sequence[Device], course: _Course) -> None:
        """The next step of a roll-out that is under way."""
        now = self._clock_ms()
        members = self._members.of(case.id)
        waiting = {device.device for device in devices if device.model_digest == release.replaces}
        plan = rollout.step(
            devices,
            members,
            release,
            policy=self._policy,
            config=self._config.rollout,
            now_ms=now,
            traits=self._members.traits(waiting) if release.group == 0 and not release.paused else {},
            told=self._told(release) if rollout.asks(members, self._config.rollout, now) else rollout.NOTHING,
        )
        changed = msgspec.structs.replace(case, release=plan.release, updated_ms=now)
        move: Move | None = None
        if case.state == "released" and plan.hints:
            moved = cases.move(case, "rolling_out", at_ms=now, release=plan.release)
            move = Move(case=moved, text=plan.text)
        elif plan.done:
            moved = cases.move(case, "closed", at_ms=now, release=plan.release)
            move = Move(case=moved, text=f"release {release.sequence} runs on {len(plan.release.updated)} devices")
        elif plan.release.paused and not release.paused:
            move = self._stopped(changed, plan)
        elif plan.text:
            move = Move(case=changed, text=plan.text)

        def also(db: Connection, written: Case) -> Case:
            self._members.put(db, written.id, plan.members)
            return written

        if move is not None:
            case = self._save(move, also=also)
        elif case.state == "rolling_out" and (plan.release != release or plan.members):
            case = self._book.note(changed, also)
        course.withdrawn |= waiting & {member.device for member in members}
        if case.state in ("rolling_out", "closed"):
            course.hints |= dict.fromkeys(plan.hints, release)

    def _stopped(self, case: Case, plan: rollout.Plan) -> Move:
        """Too many devices fail: what policy says to do about it."""
        now, choice = self._clock_ms(), self._config.rollout.on_error
        if choice == "back" and len(plan.failed) < self._policy.min_devices:
            choice = "pause"
        if choice == "pause":
            return Move(case=case, text=plan.text, kind="paused")
        running = msgspec.structs.replace(plan.release, paused="")
        state: State = "aborted" if choice == "abort" else "rolling_back"
        moved = cases.move(case, state, at_ms=now, release=running, note=plan.release.paused)
        return Move(case=moved, text=f"{plan.text}; rollout.on_error is {choice}")

    def _told(self, release: Released) -> rollout.Told:
        before, since = self.models.get(release.replaces), self.models.get(release.model_digest)
        return rollout.Told(
            before=self._members.counts(release.replaces, before.guard.guard_digest) if before else {},
            since=self._members.counts(release.model_digest, release.guard_digest),
            promised=min(1.0, SLACK * since.guard.fpr) if since else None,
        )

    def _offered(self, case: Case) -> frozenset[str]:
        """The devices that a roll-out which ended was offered to."""
        if case.id not in self._ended:
            self._ended[case.id] = frozenset(member.device for member in self._members.of(case.id))
        return self._ended[case.id]

    def _take_back(self, case: Case, release: Released, devices: Sequence[Device]) -> Case:
        """Sign the model before anew, and follow it until those who are there run it."""
        now = self._clock_ms()
        if case.back is None:
            made = self._made(release.replaces, of=release.model_digest)
            if made is None:
                self._wait_for(case, f"the model before is not at hand, or its release waits for {_SIGNATURE}")
                return case
            back = _released(made, at_ms=now)
            changed = msgspec.structs.replace(case, back=back, updated_ms=now)
            return self._save(Move(case=changed, text=f"release {back.sequence} brings the model before back"))
        timeout_s = self._config.rollout.timeout_s
        back, done = rollout.taken_back(devices, case.back, timeout_s=timeout_s, now_ms=now)
        if done and case.state == "rolling_back":
            left = f", not on {', '.join(back.held)}" if back.held else ""
            moved = cases.move(case, "rolled_back", at_ms=now, back=back)
            return self._save(
                Move(case=moved, text=f"release {back.sequence} runs on {len(back.updated)} devices{left}")
            )
        if back != case.back:
            return self._book.note(msgspec.structs.replace(case, back=back, updated_ms=now))
        return case

    def _shortest(self, ahead: Sequence[Released], course: _Course) -> Released:
        """One release that leads where several do, signed where there is none; the first of them if it cannot be."""
        first, last = ahead[0], ahead[-1]
        if len(ahead) == 1:
            return first
        key = (first.replaces, last.model_digest)
        if key not in self._direct:
            made = self._made(last.model_digest, of=first.replaces)
            if made is None:
                return first
            self._direct[key] = _released(made, at_ms=self._clock_ms())
            case = next(case for case, release in course.settled if release is last)
            text = f"release {made.sequence} is for devices that were away and still run model {first.replaces[:12]}"
            if all(entry.why != text for entry in self._book.audit(case.id)):
                self._save(Move(case=case, text=text, kind="caught_up"))
        return self._direct[key]

    def _made(self, model_digest: str, *, of: str) -> Release | None:
        """A release of a model that the hub has, for devices that run another one; None where that cannot be made."""
        model = self.models.get(model_digest)
        if model is None or self._repository is None:
            return None
        content, guard = read_model(model.guarded)
        if guard.model_digest != model_digest:
            return None
        made = self._repository.add_repair(
            content,
            name=model.name,
            model_digest=model_digest,
            guard_digest=guard.guard_digest,
            replaces=of,
            sidecar=_sidecar_beside(model.guarded, guard),
        )
        return made if made.published else None

    def _publish(self, devices: Sequence[Device], course: _Course) -> None:
        """Publish hints that do not stand yet, or that their device shows no sign of; withdraw those that shall not.

        A broker may forget what is retained: each connection begins anew.
        """
        if self._listener.connections != self._connection:
            self._connection = self._listener.connections
            self._published.clear()
        now_s = time.monotonic()
        for device in devices:
            name, release = device.device, course.hints.get(device.device)
            stands, at_s = self._published.get(name, (None, 0.0))
            if release is not None:
                desired = Desired(target=release.target, sequence=release.sequence)
                due = stands != release.sequence or now_s - at_s >= rollout.repeat_after_s(device, release)
                if due and self._listener.publish(name, topics.MODEL_DESIRED, desired, retain=True):
                    self._published[name] = (release.sequence, now_s)
            elif (
                name in course.withdrawn and stands != _NOTHING and self._listener.withdraw(name, topics.MODEL_DESIRED)
            ):
                self._published[name] = (_NOTHING, now_s)

    def _adopt(self, known: Sequence[Case]) -> None:
        """Watch the repaired model of each release like any other; its files may come from another hub's job."""
        for case in known:
            if case.release is None or case.result is None or case.release.model_digest in self.models:
                continue
            owners = case.private and not case.release.target.startswith(REPAIRED)
            if (case.id, case.release.sequence) in self._unusable or (case.job is None and not owners):
                continue
            keras: Path | None = None
            try:
                if owners or case.job is None:
                    guarded = self._owners_file(case.release)
                else:
                    guarded, keras = self._files(case, case.job)
                _, guard = read_model(guarded)
            except (ModelError, OSError) as error:
                log.error("a released model is not watched: %s", error)  # noqa: TRY400
                self._unusable.add((case.id, case.release.sequence))
                continue
            before = self.models.get(case.model_digest)
            private = case.private or (before is not None and before.private)
            self.models[guard.model_digest] = Model(
                name=case.model,
                guarded=guarded,
                keras=str(keras) if keras is not None and keras.exists() and not private else None,
                data=before.data if before else "",
                guard=guard,
                private=private,
            )

    def _files(self, case: Case, job: int) -> tuple[Path, Path]:
        """The repaired model and its trainable form as files of this hub."""
        folder = self._config.state_dir / "models" / str(case.id)
        paths = folder / "repaired.tflite", folder / "repaired.keras"
        names: tuple[FileName, ...] = ("output", "trainable", "sidecar")
        for path, name in zip((*paths, sidecar.path_beside(paths[0])), names, strict=True):
            content = None if path.exists() else self._jobs.file(job, name)
            if content is not None:
                folder.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{path.name}.tmp")
                temporary.write_bytes(content)
                temporary.replace(path)
        return paths

    def _owners_file(self, release: Released) -> Path:
        """A release that was signed offline, among those that are served. Raises ModelError where it is not there."""
        made = self._repository.releases() if self._repository is not None else ()
        digest = next((one.file_digest for one in made if one.target == release.target), None)
        if digest is None or self._config.release is None:
            raise ModelError(f"release {release.sequence}", got="not published", expected="a release of the owner")
        return self._config.release.folder / "targets" / f"{digest}.{release.target}"

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


def _released(made: Release, *, at_ms: int) -> Released:
    assert made.replaces is not None
    return Released(
        target=made.target,
        sequence=made.sequence,
        model_digest=made.model_digest,
        guard_digest=made.guard_digest,
        replaces=made.replaces,
        at_ms=at_ms,
    )


def _sidecar_beside(guarded: Path, guard: GuardMetadata) -> bytes | None:
    """The sidecar of a model that the hub has; None where it has none, or another one."""
    with suppress(OSError):
        content = sidecar.path_beside(guarded).read_bytes()
        return content if sidecar.digest(content) == guard.sidecar_digest else None
    return None
