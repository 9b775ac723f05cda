"""Keeps suspicions and cases, who moved them and why, what was told about them, and the trust in devices.

Rules enforced here:

* a record, its audit trail, its entry in the timeline and the notifications of it are one transaction;
* a record is written only by who read it last: of two hubs, or a hub and a person, the second must read again;
* the audit trail is only ever added to;
* a decision names the step that it is on, who made it and why, and is refused where that step does not wait for one;
* a finding of one kind on one subject is told at most once a day.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, Table, insert, select, update
from sqlalchemy.exc import IntegrityError

from edgeguard.contract.guard import GuardMetadata
from edgeguard.errors import ConfigError
from edgeguard.hub import batch, cases, evidence, schema, tables, trust
from edgeguard.hub.cases import OPEN, Case, Result, State, Steering, Step
from edgeguard.hub.config import PolicyConfig
from edgeguard.hub.evidence import LabelEvidence
from edgeguard.hub.store import Store
from edgeguard.hub.trust import Trust

HUB = "hub"
"""Who moved a record where no person did."""
DAY_MS = 86_400_000
_TRIES = 5
_NOT_OUT = ("refused", "rolled_back", "rolling_back")


class StaleError(Exception):
    """Somebody else has written the record meanwhile: read it again."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """A record in its next state, and what to say of it. ``kind`` is that of the event, by default the new state."""

    case: Case
    text: str
    kind: str = ""
    who: str = HUB


@dataclass(frozen=True, kw_only=True)
class Audit:
    """One entry of the audit trail: who or what moved ``subject`` from ``was`` to ``became``, when and why."""

    id: int
    at_ms: int
    subject: str
    who: str
    was: str | None
    became: str
    why: str


class Casebook:
    """The records of one fleet. Every method may be called from any thread.

    Args:
        store: the database.
        clock_ms: the hub's clock.
        targets: the names of those who are to be told of an event of a kind.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock_ms: Callable[[], int],
        targets: Callable[[str], Sequence[str]] = lambda _kind: (),
    ) -> None:
        self._store = store
        self._clock_ms = clock_ms
        self._targets = targets

    def all(self) -> list[Case]:
        """All records, oldest first."""
        table = schema.cases
        with self._store.read() as db:
            rows = db.execute(select(table).where(table.c.fleet == self._store.fleet).order_by(table.c.id))
            return [_to_case(row) for row in rows]

    def cases(self) -> list[Case]:
        """Those that an inspection confirmed."""
        return [case for case in self.all() if case.is_case]

    def suspicions(self) -> list[Case]:
        """The others: open, dismissed, refused, or not checked."""
        return [case for case in self.all() if not case.is_case]

    def get(self, case_id: int) -> Case | None:
        """One record, None where there is none of this number."""
        with self._store.read() as db:
            return self._read(db, case_id)

    def save(self, *moves: Move, also: Callable[[Connection, Case], Case] | None = None) -> Case:
        """Write the moves of one record, in their order.

        Args:
            moves: of one record; one without an id is new and gets one.
            also: what else belongs into the transaction. It is given the record and may change it, but its id.

        Returns:
            The record as it was written.

        Raises:
            StaleError: the record is no longer what the moves began with.
        """
        case = moves[-1].case
        with self._store.write() as db:
            was = self._state_before(db, case)
            case = self._put(db, also(db, case) if also else case)
            for move in moves:
                if move.case.state != was:
                    self._judge(db, move.case)
                subject = f"case {case.id}"
                self._add_audit(db, subject, move.who, was, move.case.state, move.text, case.updated_ms)
                was = move.case.state
                shown = msgspec.structs.replace(move.case, id=case.id)
                self._add_event(db, move.kind or was, subject, move.text, case.updated_ms, _detail(shown), shown)
        return case

    def note(self, case: Case, also: Callable[[Connection, Case], Case] | None = None) -> Case:
        """Write a record that did not move: nothing to tell. ``also`` and errors as for :meth:`save`."""
        with self._store.write() as db:
            self._state_before(db, case)
            return self._put(db, also(db, case) if also else case)

    def decide(self, case_id: int, step: Step, approve: bool, who: str, why: str = "") -> Case:
        """Record a person's decision on a step.

        Raises:
            ConfigError: there is no such record, or the step is not open for a decision.
        """
        who, why = batch.plain(who), batch.plain(why)

        def after(case: Case) -> Move:
            decided = cases.decided(case, step, approve=approve, who=who, why=why, at_ms=self._clock_ms())
            text = decided.note if not approve else f"{who} approved {step}" + (f": {why}" if why else "")
            return Move(case=decided, text=text, kind="approved" if approve else "", who=who)

        return self._decided(case_id, after, expected="a step that waits")

    def steer(self, case_id: int, how: Steering, who: str, why: str = "") -> Case:
        """Record a person's decision on a roll-out.

        Raises:
            ConfigError: there is no such record, or its roll-out is not where that can be done.
        """
        who, why = batch.plain(who), batch.plain(why)

        def after(case: Case) -> Move:
            if how == "back":
                self._check_latest(case)
            steered = cases.steered(case, how, who=who, why=why, at_ms=self._clock_ms())
            done = {"pause": "paused", "resume": "resumed", "abort": "aborted", "back": "asked to roll back"}[how]
            text = f"{who} {done} the roll-out" + (f": {why}" if why else "")
            kinds: dict[Steering, str] = {"pause": "paused", "resume": "resumed"}
            return Move(case=steered, text=text, kind=kinds.get(how, ""), who=who)

        return self._decided(case_id, after, expected="edgeguard hub rollout shows what can be done")

    def found_in_private(self, case_id: int, result: Result, who: str, why: str = "") -> Case:
        """Record what three parties found of a private model, and who brought it.

        Raises:
            ConfigError: there is no such record, or it waits for no such finding.
        """
        who, why = batch.plain(who), batch.plain(why)

        def after(case: Case) -> Move:
            others = (one for one in self.all() if one.id != case.id and one.model_digest == case.model_digest)
            taken = next((one.id for one in others if one.state in (*OPEN, "closed")), None)
            if taken is not None:
                raise ValueError(f"case {taken} of the same model is open, or has replaced it")
            moved = cases.found_in_private(case, result, at_ms=self._clock_ms())
            text = f"{who} brought what was found in private: {moved.note}" + (f": {why}" if why else "")
            return Move(case=moved, text=text, who=who)

        return self._decided(case_id, after, expected="a suspicion of a private model")

    def _check_latest(self, case: Case) -> None:
        """Raise ValueError where a later release replaces that of this case: what ran before that is not before it."""
        digest = case.release.model_digest if case.release else None
        later = [c.id for c in self.all() if c.model_digest == digest and c.release and c.state not in _NOT_OUT]
        if later:
            raise ValueError(f"the release of case {later[-1]} replaces that of case {case.id}: that one comes first")

    def _decided(self, case_id: int, after: Callable[[Case], Move], *, expected: str) -> Case:
        """Write what a person decided on a record as it is now, whoever else writes it."""
        for _ in range(_TRIES):
            case = self.get(case_id)
            if case is None:
                raise ConfigError(f"case {case_id}", got="no such case", do="list them: edgeguard hub cases")
            try:
                move = after(case)
            except ValueError as error:
                raise ConfigError(f"decision on case {case_id}", got=error, expected=expected) from error
            try:
                return self.save(move)
            except StaleError:
                continue
        raise ConfigError(f"decision on case {case_id}", got="a case that changes all the time", do="try again")

    def audit(self, subject: int | str) -> list[Audit]:
        """The audit trail of a case (its id) or of another subject, oldest first."""
        table = tables.audit
        name = f"case {subject}" if isinstance(subject, int) else subject
        chosen = select(table).where(table.c.fleet == self._store.fleet, table.c.subject == name)
        with self._store.read() as db:
            return [
                Audit(id=r.id, at_ms=r.at_ms, subject=r.subject, who=r.who, was=r.was, became=r.became, why=r.why)
                for r in db.execute(chosen.order_by(table.c.id))
            ]

    def add_audit(self, db: Connection, subject: str, who: str, was: str | None, became: str, why: str) -> None:
        """Add to the audit trail within the caller's transaction."""
        self._add_audit(db, subject, who, was, became, why, self._clock_ms())

    def tell(self, kind: str, subject: str, text: str, detail: Mapping[str, Any] | None = None) -> None:
        """Write one entry of the timeline, and notify of it."""
        with self._store.write() as db:
            self._add_event(db, kind, subject, text, self._clock_ms(), detail or {}, None)

    def tell_daily(self, kind: str, subject: str, text: str, detail: Mapping[str, Any] | None = None) -> bool:
        """Tell of a finding, unless one of this kind on this subject was told within a day. Whether it was told."""
        now = self._clock_ms()
        key = {"fleet": self._store.fleet, "kind": kind, "subject": subject}
        with self._store.write() as db:
            told = claim(db, tables.findings, key, "told_ms", now, free_before=now - DAY_MS)
            if told:
                self._add_event(db, kind, subject, text, now, detail or {}, None)
        return told

    def trust(self, model_digest: str) -> dict[str, Trust]:
        """What is known of the devices that ever stood behind a suspicion of this model, as it stands now."""
        with self._store.read() as db:
            return trust.standing(self._trust(db, model_digest), self._clock_ms())

    def evidence(self, case: Case, guard: GuardMetadata, policy: PolicyConfig) -> LabelEvidence | None:
        """What the devices behind a record sent of its label of late, pooled; None where nobody did under this guard.

        Where none of them did, as after a change of guard, it is what other devices sent of the label.
        """
        digest = case.model_digest
        rows = self._store.label_features(digest, guard.guard_digest, case.label, enough=policy.min_flagged)
        # Others see no trigger, and would hide its channels.
        behind = [row for row in rows if row.device in case.devices] or rows
        if not behind:
            return None
        weights = {device: known.weight for device, known in self.trust(digest).items()}
        return evidence.pool_label(
            behind, model_digest=digest, width=guard.feature_count, share=policy.device_share, weights=weights
        )

    def _judge(self, db: Connection, case: Case) -> None:
        """Change the trust in the devices behind a suspicion, once an inspection dismissed or confirmed it."""
        known = self._trust(db, case.model_digest)
        if case.state == "dismissed":
            new = trust.after_rejection(known, case.devices, case.updated_ms)
        elif case.state == "confirmed":
            new = trust.after_confirmation(known, case.devices)
        else:
            return
        for device, detail in new.items():
            key = {"fleet": self._store.fleet, "model_digest": case.model_digest, "device": device}
            values = {"detail": msgspec.to_builtins(detail)}
            if device in known:
                db.execute(update(tables.trust).where(*equals(tables.trust, key)).values(**values))
            else:
                db.execute(insert(tables.trust).values(**key, **values))

    def _trust(self, db: Connection, model_digest: str) -> dict[str, Trust]:
        table = tables.trust
        mine = equals(table, {"fleet": self._store.fleet, "model_digest": model_digest})
        return {row.device: msgspec.convert(row.detail, Trust) for row in db.execute(select(table).where(*mine))}

    def _read(self, db: Connection, case_id: int, *, lock: bool = False) -> Case | None:
        table = schema.cases
        chosen = select(table).where(table.c.id == case_id, table.c.fleet == self._store.fleet)
        row = db.execute(chosen.with_for_update() if lock else chosen).one_or_none()
        return _to_case(row) if row is not None else None

    def _state_before(self, db: Connection, case: Case) -> State | None:
        """Lock a record for this transaction. Raises StaleError where it is not the one that was read."""
        before = self._read(db, case.id, lock=True) if case.id else None
        if case.id and (before is None or before.revision != case.revision):
            raise StaleError(f"case {case.id} was written by somebody else")
        return before.state if before else None

    def _put(self, db: Connection, case: Case) -> Case:
        table = schema.cases
        case = msgspec.structs.replace(case, revision=case.revision + 1)
        row = {
            "fleet": self._store.fleet,
            "model_digest": case.model_digest,
            "label": case.label,
            "state": case.state,
            "created_ms": case.created_ms,
            "updated_ms": case.updated_ms,
            "detail": msgspec.to_builtins(case),
        }
        if case.id:
            db.execute(update(table).where(table.c.id == case.id).values(**row))
            return case
        key = db.execute(insert(table).values(**row)).inserted_primary_key
        assert key is not None
        return msgspec.structs.replace(case, id=key[0])

    def _add_audit(
        self, db: Connection, subject: str, who: str, was: str | None, became: str, why: str, at_ms: int
    ) -> None:
        row = {
            "at_ms": at_ms,
            "subject": subject,
            "who": batch.plain(who),
            "was": was,
            "became": became,
            "why": batch.plain(why),
        }
        db.execute(insert(tables.audit).values(fleet=self._store.fleet, **row))

    def _add_event(
        self,
        db: Connection,
        kind: str,
        subject: str,
        text: str,
        at_ms: int,
        detail: Mapping[str, Any],
        case: Case | None,
    ) -> None:
        fleet = self._store.fleet
        batch.add_event(db, fleet, at_ms=at_ms, kind=kind, subject=subject, text=text, detail=detail)
        targets = self._targets(kind)
        if not targets:
            return
        told = {"v": 1, "fleet": fleet, "at_ms": at_ms, "kind": kind, "subject": subject, "text": text}
        more = {"explanation": cases.explain(case)} if case else {}
        body = msgspec.json.encode({**told, "detail": dict(detail), **more})
        row = {"fleet": fleet, "body": body, "created_ms": at_ms, "next_ms": 0, "attempts": 0}
        db.execute(insert(tables.outbox), [{**row, "target": target} for target in targets])


def equals(table: Table, key: Mapping[str, Any]) -> list[Any]:
    """The conditions under which a row has this key."""
    return [table.c[name] == value for name, value in key.items()]


def claim(
    db: Connection, table: Table, key: Mapping[str, Any], column: str, value: int, *, free_before: int, **more: Any
) -> bool:
    """Set a time in the row of a key where the time there has passed, or make the row. Whether this one did it.

    Of several that try at once, on any database, exactly one does.
    """
    passed = update(table).where(*equals(table, key), table.c[column] < free_before).values({column: value, **more})
    if db.execute(passed).rowcount:
        return True
    try:
        with db.begin_nested():
            db.execute(insert(table).values({**key, column: value, **more}))
    except IntegrityError:
        return False
    return True


def _to_case(row: Row[Any]) -> Case:
    return msgspec.structs.replace(msgspec.convert(row.detail, Case), id=row.id)


def _detail(case: Case) -> dict[str, Any]:
    return {"case": case.id, "model": case.model, "label": case.label, "is_case": case.is_case}
