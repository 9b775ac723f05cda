"""What the API reads from the database, page by page.

Rules enforced here:

* a page has at most ``MAX_PAGE`` rows and is found by the key of the row before it, never by counting rows: the last
  page costs what the first one does, and a row that is added meanwhile moves none;
* a cursor is made and read here alone; one that somebody wrote himself finds rows of this fleet or is refused;
* the log of reports has no index but its number. A page looks at ``WINDOW`` of them at most, so it can be short, or
  empty, with more to come.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta
from sqlalchemy import Column, Row, Select, Table, func, select

from edgeguard.errors import ConfigError
from edgeguard.hub import cases, schema, tables, views
from edgeguard.hub.casebook import Casebook
from edgeguard.hub.metrics import Census
from edgeguard.hub.store import Store
from edgeguard.hub.views import MAX_INTEGER, Page, View

MAX_PAGE = 500
WINDOW = 200_000
_NUMBER = msgspec.json.Decoder(Annotated[int, Meta(ge=0, le=MAX_INTEGER)])
_NAME = msgspec.json.Decoder(Annotated[str, Meta(pattern=r"^[a-z0-9._~-]{1,127}$(?!\n)")])
K = TypeVar("K", int, str)
V = TypeVar("V", bound=View)


class Queries:
    """The reading side of one fleet's database. Every method may be called from any thread.

    Args:
        store: the database.
        book: the records and their audit trail.
    """

    def __init__(self, store: Store, book: Casebook) -> None:
        self._store = store
        self._book = book

    def alive(self) -> None:
        """Ask the database for nothing. Raises SQLAlchemyError where it does not answer."""
        with self._store.read() as db:
            db.scalar(select(1))

    def census(self) -> Census:
        """What there is of everything."""
        return Census(
            counts=self._store.counts(),
            devices=self._by_state(schema.devices),
            cases=self._by_state(schema.cases),
            jobs=self._by_state(tables.jobs),
        )

    def running(self) -> dict[str, int]:
        """How many devices run each model, by model digest."""
        table = schema.devices
        chosen = select(table.c.model_digest, func.count()).where(
            table.c.fleet == self._store.fleet, table.c.model_digest.is_not(None)
        )
        with self._store.read() as db:
            return _counts(db.execute(chosen.group_by(table.c.model_digest)).all())

    def devices(
        self, *, limit: int, cursor: str | None, state: str | None = None, model_digest: str | None = None
    ) -> Page[views.Device]:
        """Devices by name, without their birth and health messages."""
        table = schema.devices
        chosen = self._devices()
        if state is not None:
            chosen = chosen.where(table.c.state == state)
        if model_digest is not None:
            chosen = chosen.where(table.c.model_digest == model_digest)
        if cursor is not None:
            chosen = chosen.where(table.c.device > _name(cursor))
        return self._page(chosen.order_by(table.c.device), limit, _device, lambda row: row.device)

    def device(self, name: str) -> views.Device | None:
        """One device with all that it said of itself."""
        table = schema.devices
        with self._store.read() as db:
            row = db.execute(self._devices().where(table.c.device == name)).one_or_none()
        if row is None:
            return None
        return _device(row).model_copy(update={"birth": row.birth, "health": row.health})

    def reports(self, *, limit: int, cursor: str | None, device: str | None = None) -> Page[views.Report]:
        """Reports, the newest first."""
        table, models = schema.reports, schema.models
        with self._store.read() as db:
            newest = db.scalar(select(func.max(table.c.id))) or 0
            oldest = db.scalar(select(func.min(table.c.id))) or 0
        before = newest + 1 if cursor is None else _number(cursor)
        after = max(before - 1 - WINDOW, oldest - 1)
        chosen = (
            select(
                table.c.id, table.c.boot, table.c.seq, table.c.stored_ms, table.c.inputs, table.c.unchecked,
                table.c.flagged, schema.devices.c.device, models.c.model_digest, models.c.guard_digest,
            )
            .join(schema.devices, schema.devices.c.id == table.c.device_id)
            .join(models, models.c.id == table.c.model_id)
            .where(schema.devices.c.fleet == self._store.fleet, table.c.id < before, table.c.id > after)
        )  # fmt: skip
        if device is not None:
            chosen = chosen.where(schema.devices.c.device == device)
        page = self._page(chosen.order_by(table.c.id.desc()), limit, _report, lambda row: row.id)
        if page.next is None and after >= oldest:
            return Page(items=page.items, next=_cursor(after + 1))
        return page

    def cases(
        self,
        *,
        limit: int,
        cursor: str | None,
        state: str | None = None,
        is_case: bool | None = None,
        awaiting: bool | None = None,
    ) -> Page[views.Case]:
        """Suspicions and cases, the newest first."""
        table = schema.cases
        chosen = select(table).where(table.c.fleet == self._store.fleet)
        if state is not None:
            chosen = chosen.where(table.c.state == state)
        if is_case is not None:
            chosen = chosen.where(table.c.detail["is_case"].as_boolean() == is_case)
        if awaiting is not None:
            step = table.c.detail["awaiting"].as_string()
            chosen = chosen.where(step.is_not(None) if awaiting else step.is_(None))
        if cursor is not None:
            chosen = chosen.where(table.c.id < _number(cursor))
        return self._page(
            chosen.order_by(table.c.id.desc()), limit, lambda row: _case(_to_case(row)), lambda row: row.id
        )

    def case(self, number: int) -> views.CaseDetail | None:
        """One record with all that is known of it."""
        case = self._book.get(number)
        if case is None:
            return None
        trail = self._book.audit(number)
        return views.CaseDetail(
            **_case(case).model_dump(),
            explanation=cases.explain(case),
            channels=[views.Channel(**msgspec.to_builtins(channel)) for channel in case.channels],
            release=_release(case.release),
            back=_release(case.back),
            summary=None if case.result is None else case.result.summary,
            audit=[views.Audit(at_ms=e.at_ms, who=e.who, was=e.was, became=e.became, why=e.why) for e in trail],
        )

    def members(self, case: int, *, limit: int, cursor: str | None, state: str | None = None) -> Page[views.Member]:
        """The devices that a case's release was offered to, by name."""
        table = tables.members
        chosen = select(table).where(table.c.fleet == self._store.fleet, table.c.case_id == case)
        if state is not None:
            chosen = chosen.where(table.c.state == state)
        if cursor is not None:
            chosen = chosen.where(table.c.device > _name(cursor))
        return self._page(chosen.order_by(table.c.device), limit, _member, lambda row: row.device)

    def events(self, *, limit: int, cursor: str | None, newest_first: bool = False) -> Page[views.Event]:
        """The timeline, from its beginning or from its end."""
        table = schema.events
        chosen = select(table).where(table.c.fleet == self._store.fleet)
        if cursor is not None:
            key = _number(cursor)
            chosen = chosen.where(table.c.id < key if newest_first else table.c.id > key)
        order: Column[Any] | Any = table.c.id.desc() if newest_first else table.c.id
        return self._page(chosen.order_by(order), limit, _event, lambda row: row.id)

    def events_after(self, number: int, *, through: int, limit: int) -> list[views.Event]:
        """The entries of the timeline after one, up to another."""
        table = schema.events
        chosen = select(table).where(table.c.fleet == self._store.fleet, table.c.id > number, table.c.id <= through)
        with self._store.read() as db:
            return [_event(row) for row in db.execute(chosen.order_by(table.c.id).limit(limit))]

    def newest_event(self) -> int:
        """The number of the last entry of the timeline, 0 where there is none."""
        table = schema.events
        with self._store.read() as db:
            return db.scalar(select(func.max(table.c.id)).where(table.c.fleet == self._store.fleet)) or 0

    def dead_letters(self, *, limit: int, cursor: str | None) -> Page[views.DeadLetter]:
        """Those still kept, the newest first."""
        table = schema.dead_letters
        chosen = select(table).where(table.c.fleet == self._store.fleet)
        if cursor is not None:
            chosen = chosen.where(table.c.id < _number(cursor))
        return self._page(chosen.order_by(table.c.id.desc()), limit, _dead_letter, lambda row: row.id)

    def commands(
        self, *, limit: int, cursor: str | None, device: str | None = None, state: str | None = None
    ) -> Page[views.CommandState]:
        """Commands, the newest first: their ids begin with their time."""
        table = tables.commands
        chosen = select(table).where(table.c.fleet == self._store.fleet)
        if device is not None:
            chosen = chosen.where(table.c.device == device)
        if state is not None:
            chosen = chosen.where(table.c.state == state)
        if cursor is not None:
            chosen = chosen.where(table.c.id < _name(cursor))
        return self._page(chosen.order_by(table.c.id.desc()), limit, _command, lambda row: row.id)

    def command(self, key: str) -> views.CommandState | None:
        """One command."""
        table = tables.commands
        with self._store.read() as db:
            row = db.execute(select(table).where(table.c.fleet == self._store.fleet, table.c.id == key)).one_or_none()
        return None if row is None else _command(row)

    def _devices(self) -> Select[Any]:
        table, streams = schema.devices, schema.streams
        heard = select(func.max(streams.c.last_ms)).where(streams.c.device_id == table.c.id).scalar_subquery()
        return select(table, heard.label("heard_ms")).where(table.c.fleet == self._store.fleet)

    def _by_state(self, table: Table) -> dict[str, int]:
        chosen = select(table.c.state, func.count()).where(table.c.fleet == self._store.fleet)
        with self._store.read() as db:
            return _counts(db.execute(chosen.group_by(table.c.state)).all())

    def _page(
        self, chosen: Select[Any], limit: int, view: Callable[[Row[Any]], V], key: Callable[[Row[Any]], int | str]
    ) -> Page[V]:
        with self._store.read() as db:
            rows: Sequence[Row[Any]] = db.execute(chosen.limit(limit + 1)).all()
        more = _cursor(key(rows[limit - 1])) if len(rows) > limit else None
        return Page(items=[view(row) for row in rows[:limit]], next=more)


def _counts(rows: Iterable[Any]) -> dict[str, int]:
    return dict(rows)


def _cursor(key: int | str) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")


def _number(cursor: str) -> int:
    return _key(cursor, _NUMBER)


def _name(cursor: str) -> str:
    return _key(cursor, _NAME)


def _key(cursor: str, reader: msgspec.json.Decoder[K]) -> K:
    """The key in a cursor. Raises ConfigError for one that was not made here."""
    try:
        return reader.decode(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (ValueError, RecursionError) as error:
        raise ConfigError("cursor", got=repr(cursor[:60]), expected="next of the page before") from error


def _device(row: Row[Any]) -> views.Device:
    return views.Device(
        device=row.device,
        state=row.state,
        last_seen_ms=max(row.last_seen_ms, row.heard_ms or 0) or None,
        model_digest=row.model_digest,
        guard_digest=row.guard_digest,
        sequence=row.sequence,
        outcome=row.outcome,
        outcome_sequence=row.outcome_sequence,
        reason=row.reason,
        birth=None,
        health=None,
    )


def _report(row: Row[Any]) -> views.Report:
    return views.Report(
        device=row.device,
        boot=f"{row.boot & 0xFFFF_FFFF_FFFF_FFFF:016x}",
        seq=row.seq,
        model_digest=row.model_digest,
        guard_digest=row.guard_digest,
        inputs=row.inputs,
        unchecked=row.unchecked,
        flagged=row.flagged,
        stored_ms=row.stored_ms,
    )


def _to_case(row: Row[Any]) -> cases.Case:
    return msgspec.structs.replace(msgspec.convert(row.detail, cases.Case), id=row.id)


def _case(case: cases.Case) -> views.Case:
    return views.Case.model_validate({name: getattr(case, name) for name in views.Case.model_fields})


def _release(release: cases.Released | None) -> views.Release | None:
    if release is None:
        return None
    fields = msgspec.to_builtins(release)
    return views.Release(**{name: fields[name] for name in views.Release.model_fields})


def _member(row: Row[Any]) -> views.Member:
    return views.Member(**{name: row.detail[name] for name in views.Member.model_fields})


def _event(row: Row[Any]) -> views.Event:
    return views.Event(id=row.id, at_ms=row.at_ms, kind=row.kind, subject=row.subject, text=row.text, detail=row.detail)


def _dead_letter(row: Row[Any]) -> views.DeadLetter:
    head = base64.b64encode(row.head).decode()
    return views.DeadLetter(number=row.id, at_ms=row.at_ms, topic=row.topic, reason=row.reason, head=head)


def _command(row: Row[Any]) -> views.CommandState:
    return views.CommandState(
        id=row.id,
        device=row.device,
        name=row.name,
        state=row.state,
        issued_ms=row.issued_ms,
        replied_ms=row.replied_ms,
        reason=row.reason,
        reply=None if row.reply is None else msgspec.json.decode(row.reply),
    )
