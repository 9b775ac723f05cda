"""The hub's database: what was received, what it adds up to, the cases and the timeline.

Rules enforced here:

* one transaction takes a whole batch: reports, their evidence and the record of what was received, so that nothing is
  lost and nothing counted twice, whenever the hub is killed;
* a commit is on disk when it returns (SQLite: write-ahead log, ``synchronous=FULL``);
* dead letters are bounded: the oldest leave;
* all that is particular to SQLite stands in ``_prepare_sqlite``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, Row, Table, create_engine, event, func, insert, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from edgeguard.contract.messages import Ack
from edgeguard.errors import ConfigError
from edgeguard.hub import batch, schema
from edgeguard.hub.cases import Case
from edgeguard.hub.evidence import DeviceEvidence
from edgeguard.hub.ingest import Accepted, Device, Rejected

BUSY_TIMEOUT_S = 5.0
_WRITES = "edgeguard_writes"
_SUMMED = ("inputs", "unchecked", "flagged")


@dataclass(frozen=True, kw_only=True)
class Event:
    """One entry of the timeline. ``id`` grows with time."""

    id: int
    at_ms: int
    kind: str
    subject: str
    text: str
    detail: Mapping[str, Any]


class Store:
    """The database of one fleet. Every method may be called from any thread.

    Args:
        url: a SQLAlchemy URL.
        fleet: rows of other fleets are neither read nor touched.
        busy_timeout_s: how long a SQLite transaction waits for another one.

    Raises:
        ConfigError: the database cannot be opened, is damaged or of another version.
    """

    def __init__(self, url: str, *, fleet: str, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self._fleet = fleet
        try:
            parsed = make_url(url)
            name = parsed.render_as_string(hide_password=True)
        except SQLAlchemyError as error:
            raise ConfigError("store.url", got=error, expected="a URL such as sqlite:////var/lib/hub.db") from error
        try:
            sqlite = parsed.get_backend_name() == "sqlite"
            self._engine = create_engine(parsed, connect_args={"timeout": busy_timeout_s} if sqlite else {})
            if sqlite:
                _prepare_sqlite(self._engine)
            with self._write() as db:
                schema.metadata.create_all(db)
                version = db.scalar(select(func.max(schema.schema_version.c.version)))
                if version is None:
                    db.execute(insert(schema.schema_version), {"version": schema.VERSION})
        except (SQLAlchemyError, ImportError, OSError) as error:
            reason = getattr(error, "orig", None) or error
            raise ConfigError(
                f"database {name}", got=reason, expected="a database that can be read and written",
                do="check store.url, the folder and the disk",
            ) from error  # fmt: skip
        if version not in (None, schema.VERSION):
            raise ConfigError(f"database {name}", got=f"version {version}", expected=f"version {schema.VERSION}")

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def apply(self, items: Sequence[Accepted | Rejected], *, now_ms: int) -> list[tuple[str, Ack]]:
        """Take a batch in one transaction.

        Returns:
            What to acknowledge to which device, for every (device, boot) of the batch, also where all was known.

        Raises:
            SQLAlchemyError: nothing was changed.
        """
        with self._write() as db:
            return batch.apply(db, self._fleet, items, now_ms=now_ms)

    def devices(self) -> list[Device]:
        """All devices, by name."""
        table = schema.devices
        with self._read() as db:
            rows = db.execute(select(table).where(table.c.fleet == self._fleet).order_by(table.c.device))
            return [batch.to_device(row) for row in rows]

    def evidence(self, model_digest: str, guard_digest: str) -> list[DeviceEvidence]:
        """The sums of every device and label for one model with one guard."""
        table = schema.evidence
        chosen = select(table).where(
            table.c.fleet == self._fleet,
            table.c.model_digest == model_digest,
            table.c.guard_digest == guard_digest,
        )
        with self._read() as db:
            return [batch.to_evidence(row) for row in db.execute(chosen)]

    def counts(self) -> dict[str, int]:
        """Totals: reports, inputs, unchecked, flagged, alerts, dead_letters, devices."""
        reports = schema.reports
        with self._read() as db:
            row = db.execute(
                select(
                    func.count(),
                    *(
                        func.coalesce(func.sum(c), 0)
                        for c in (reports.c.inputs, reports.c.unchecked, reports.c.flagged)
                    ),
                ).where(reports.c.fleet == self._fleet)
            ).one()
            dead = select(func.max(schema.dead_letters.c.number)).where(schema.dead_letters.c.fleet == self._fleet)
            return {
                **dict(zip(("reports", *_SUMMED), map(int, row), strict=True)),
                "alerts": self._count(db, schema.alerts),
                "dead_letters": db.scalar(dead) or 0,
                "devices": self._count(db, schema.devices),
            }

    def dead_letters(self) -> list[tuple[str, str, bytes]]:
        """Those still kept, oldest first: topic, reason and head of the payload."""
        table = schema.dead_letters
        with self._read() as db:
            rows = db.execute(select(table).where(table.c.fleet == self._fleet).order_by(table.c.number))
            return [(row.topic, row.reason, row.head) for row in rows]

    def cases(self) -> list[Case]:
        """All cases, oldest first."""
        table = schema.cases
        with self._read() as db:
            rows = db.execute(select(table).where(table.c.fleet == self._fleet).order_by(table.c.id))
            return [_to_case(row) for row in rows]

    def save(self, case: Case, *events: tuple[str, str]) -> Case:
        """Write a case, and what happened to it, in one transaction.

        Args:
            case: one without an id is new and gets one.
            events: kind and text of each.

        Returns:
            The case with its id.
        """
        table = schema.cases
        row = {
            "fleet": self._fleet,
            "model_digest": case.model_digest,
            "label": case.label,
            "state": case.state,
            "created_ms": case.created_ms,
            "updated_ms": case.updated_ms,
            "detail": msgspec.to_builtins(case),
        }
        with self._write() as db:
            if case.id:
                db.execute(update(table).where(table.c.id == case.id, table.c.fleet == self._fleet), row)
            else:
                key = db.execute(insert(table), row).inserted_primary_key
                assert key is not None
                case = msgspec.structs.replace(case, id=key[0])
            for kind, text in events:
                detail = {"case": case.id, "model": case.model, "label": case.label}
                self._event(db, case.updated_ms, kind, f"case {case.id}", text, detail)
        return case

    def add_event(
        self, kind: str, subject: str, text: str, *, at_ms: int, detail: Mapping[str, Any] | None = None
    ) -> None:
        """Write one entry of the timeline."""
        with self._write() as db:
            self._event(db, at_ms, kind, subject, text, detail or {})

    def events(self, *, since: int = 0, limit: int = 1000) -> list[Event]:
        """The first ``limit`` entries of the timeline after id ``since``."""
        table = schema.events
        chosen = select(table).where(table.c.fleet == self._fleet, table.c.id > since).order_by(table.c.id).limit(limit)
        with self._read() as db:
            return [
                Event(id=r.id, at_ms=r.at_ms, kind=r.kind, subject=r.subject, text=r.text, detail=r.detail)
                for r in db.execute(chosen)
            ]

    def _event(self, db: Connection, at_ms: int, kind: str, subject: str, text: str, detail: Mapping[str, Any]) -> None:
        batch.add_event(db, self._fleet, at_ms=at_ms, kind=kind, subject=subject, text=text, detail=detail)

    def _count(self, db: Connection, table: Table) -> int:
        return db.scalar(select(func.count()).select_from(table).where(table.c.fleet == self._fleet)) or 0

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(**{_WRITES: True}) as db, db.begin():
            yield db

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._engine.connect() as db:
            yield db


def _prepare_sqlite(engine: Engine) -> None:
    """Write-ahead log, commits that reach the disk, and writers that queue up instead of failing half-way."""
    database = engine.url.database
    if database and not Path(database).parent.is_dir():
        raise OSError(f"there is no folder {Path(database).parent}")

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver leaves BEGIN to the listener below
        for setting in ("journal_mode = WAL", "synchronous = FULL"):
            connection.execute(f"PRAGMA {setting}").close()

    @event.listens_for(engine, "begin")
    def _begin(db: Connection) -> None:
        # A reader that turns into a writer half-way can fail at once; a writer says so from the start and waits.
        writes = db.get_execution_options().get(_WRITES, False)
        db.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _to_case(row: Row[Any]) -> Case:
    return msgspec.structs.replace(msgspec.convert(row.detail, Case), id=row.id)
