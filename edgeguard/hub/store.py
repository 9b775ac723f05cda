"""The hub's database: what was received, what it adds up to, the cases and the timeline.

Rules enforced here:

* one transaction takes a whole batch: reports, their evidence and the record of what was received, so that nothing is
  lost and nothing counted twice, whenever the hub is killed;
* a commit is on disk when it returns (SQLite: write-ahead log, ``synchronous=FULL``; PostgreSQL: as it is set up);
* several hubs may share one PostgreSQL. What a batch changes, it holds until the commit; where two hubs got into each
  other's way all the same, one has an ``OperationalError`` and tries again;
* totals are kept, not counted: they cost the same however many reports there are, and no retention changes them;
* dead letters are bounded: the oldest leave;
* what differs between the databases stands in ``_engine`` and in :mod:`edgeguard.hub.bulk`.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Row,
    Select,
    Table,
    case,
    create_engine,
    event,
    func,
    make_url,
    select,
)
from sqlalchemy.exc import SQLAlchemyError

from edgeguard.contract.messages import Ack
from edgeguard.errors import ConfigError
from edgeguard.hub import batch, migrations, schema, tallies
from edgeguard.hub.evidence import DeviceEvidence, LabelCounts
from edgeguard.hub.ingest import Accepted, Device, Rejected
from edgeguard.hub.limits import Limiter

BUSY_TIMEOUT_S = 5.0
EPOCH_HOURS = 24
OUTCOMES_A_DAY, OUTCOMES_AT_ONCE = 24, 16
"""How often what became of a release on one device enters the timeline: its row always has the last word."""
_WRITES = "edgeguard_writes"
_SHARDS = 16
_AGAIN_S = 0.02
_SQLITE = ("journal_mode = WAL", "synchronous = FULL", "cache_size = -65536", "secure_delete = OFF")
"""Cache in KiB. Some builds overwrite what was deleted: a page more to write for each, and the log keeps it anyway."""


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
        epoch_hours: how long an epoch is, by which counts of labels are told apart.
        busy_timeout_s: how long a SQLite transaction waits for another one.

    Raises:
        ConfigError: the database cannot be opened, is damaged or of a newer version.
    """

    def __init__(
        self, url: str, *, fleet: str, epoch_hours: int = EPOCH_HOURS, busy_timeout_s: float = BUSY_TIMEOUT_S
    ) -> None:
        self.fleet = fleet
        self._epoch_ms = epoch_hours * 3_600_000
        self._shard = secrets.randbelow(_SHARDS)
        self._numbers = batch.Numbers()
        self._outcomes = Limiter(rate=OUTCOMES_A_DAY / 86_400, burst=OUTCOMES_AT_ONCE)
        self._telling = threading.Lock()
        try:
            parsed = make_url(url)
            name = parsed.render_as_string(hide_password=True)
        except (SQLAlchemyError, ValueError):
            # What could not be read may be a part of the password: it is not shown.
            raise ConfigError(
                "store.url",
                got="no URL",
                expected="one such as sqlite:////var/lib/hub.db",
                do="escape @ and : in it",
            ) from None
        try:
            self._engine = _engine(parsed, busy_timeout_s)
            with self.read() as db:
                current = migrations.version(db) == migrations.head()
            if not current:
                with self.write() as db:
                    migrations.upgrade(db)
        except (SQLAlchemyError, ImportError, OSError) as error:
            reason = getattr(error, "orig", None) or error
            raise ConfigError(
                f"database {name}", got=reason, expected="a database that can be read and written",
                do="check store.url, the folder and the disk",
            ) from error  # fmt: skip

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
        place = batch.Place(fleet=self.fleet, epoch=self.epoch(now_ms), shard=self._shard, now_ms=now_ms)
        with self.write() as db:
            acks, learned = batch.apply(db, place, items, self._numbers, lambda name: self._may_tell(name, now_ms))
        if learned.devices or learned.models:
            self._numbers = self._numbers.with_(learned)
        return acks

    def _may_tell(self, device: str, now_ms: int) -> bool:
        with self._telling:
            return self._outcomes.passes(device, now_s=now_ms / 1000)

    def epoch(self, now_ms: int) -> int:
        """The epoch of a time."""
        return now_ms // self._epoch_ms

    def devices(self) -> list[Device]:
        """All devices, by name."""
        table, streams = schema.devices, schema.streams
        heard = select(func.max(streams.c.last_ms)).where(streams.c.device_id == table.c.id).scalar_subquery()
        chosen = select(table, heard.label("heard_ms")).where(table.c.fleet == self.fleet).order_by(table.c.device)
        with self.read() as db:
            rows = db.execute(chosen).all()
        return [replace(batch.to_device(r), last_seen_ms=max(r.last_seen_ms, r.heard_ms or 0)) for r in rows]

    def label_counts(self, model_digest: str, guard_digest: str) -> LabelCounts:
        """What every device counted for one model, by label and epoch.

        Of a device that says that it runs the model with another guard than this one, which it fitted itself, what it
        counted with that guard; what it counted before belongs to another detector.
        """
        table, devices = schema.label_counts, schema.devices
        with self.read() as db:
            rows = db.execute(
                self._by_guard(table, model_digest, guard_digest, table.c.device_id, table.c.epoch, table.c.labels)
            ).all()
            names = db.execute(
                select(devices.c.id, devices.c.device).where(devices.c.fleet == self.fleet).order_by(devices.c.device)
            )
            known = {row.id: row.device for row in names}
        guards, numbers, epochs, packed = zip(*rows, strict=True) if rows else ((), (), (), ())
        present = set(numbers)
        position = {number: i for i, number in enumerate(number for number in known if number in present)}
        which, label, inputs, flagged = tallies.unpack(packed)
        device = np.array([position[number] for number in numbers], dtype=np.int64)
        epoch = np.array(epochs, dtype=np.int64)
        return LabelCounts(
            devices=tuple(known[number] for number in position),
            device=device[which],
            label=label,
            epoch=epoch[which],
            inputs=inputs,
            flagged=flagged,
            recalibrated=frozenset(
                known[number] for number, guard in zip(numbers, guards, strict=True) if guard != guard_digest
            ),
        )

    def evidence(self, model_digest: str, guard_digest: str) -> list[DeviceEvidence]:
        """The sums of every device and label for one model, of devices as in :meth:`label_counts`."""
        return self._evidence(model_digest, guard_digest, None, None)

    def label_features(
        self, model_digest: str, guard_digest: str, label: int, *, enough: int | None = None
    ) -> list[DeviceEvidence]:
        """The sums of every device for one label of one model.

        Args:
            enough: of each device, only the newest feature vectors that hold so many flagged ones; None for all.
        """
        return self._evidence(model_digest, guard_digest, label, enough)

    def counts(self) -> dict[str, int]:
        """Totals of all that ever came: reports, inputs, unchecked, flagged, alerts, dead_letters; and devices."""
        table, devices = schema.totals, schema.devices
        sums = [func.coalesce(func.sum(table.c[name]), 0) for name in batch.TOTALS]
        with self.read() as db:
            row = db.execute(select(*sums).where(table.c.fleet == self.fleet)).one()
            known = db.scalar(select(func.count()).select_from(devices).where(devices.c.fleet == self.fleet))
        return {**dict(zip(batch.TOTALS, map(int, row), strict=True)), "devices": known or 0}

    def dead_letters(self) -> list[tuple[str, str, bytes]]:
        """Those still kept, oldest first: topic, reason and head of the payload."""
        table = schema.dead_letters
        with self.read() as db:
            rows = db.execute(select(table).where(table.c.fleet == self.fleet).order_by(table.c.id))
            return [(row.topic, row.reason, row.head) for row in rows]

    def add_event(
        self, kind: str, subject: str, text: str, *, at_ms: int, detail: Mapping[str, Any] | None = None
    ) -> None:
        """Write one entry of the timeline."""
        with self.write() as db:
            self._event(db, at_ms, kind, subject, text, detail or {})

    def events(self, *, since: int = 0, limit: int = 1000) -> list[Event]:
        """The first ``limit`` entries of the timeline after id ``since``."""
        table = schema.events
        chosen = select(table).where(table.c.fleet == self.fleet, table.c.id > since).order_by(table.c.id).limit(limit)
        with self.read() as db:
            return [
                Event(id=r.id, at_ms=r.at_ms, kind=r.kind, subject=r.subject, text=r.text, detail=r.detail)
                for r in db.execute(chosen)
            ]

    def _event(self, db: Connection, at_ms: int, kind: str, subject: str, text: str, detail: Mapping[str, Any]) -> None:
        batch.add_event(db, self.fleet, at_ms=at_ms, kind=kind, subject=subject, text=text, detail=detail)

    def _by_guard(self, table: Table, model_digest: str, guard_digest: str, *columns: Any) -> Select[Any]:
        """A guard's digest and columns of a table by model and device: of each device those with the guard it runs."""
        models, devices = schema.models, schema.devices
        runs = case(
            (devices.c.model_digest == model_digest, func.coalesce(devices.c.guard_digest, guard_digest)),
            else_=guard_digest,
        )
        return (
            select(models.c.guard_digest, *columns)
            .join(models, models.c.id == table.c.model_id)
            .join(devices, devices.c.id == table.c.device_id)
            .where(models.c.fleet == self.fleet, models.c.model_digest == model_digest, models.c.guard_digest == runs)
        )

    def _evidence(
        self, model_digest: str, guard_digest: str, label: int | None, enough: int | None
    ) -> list[DeviceEvidence]:
        """Counts and feature sums of all labels, or of one, by device and label."""
        table = schema.features
        chosen = self._by_guard(table, model_digest, guard_digest, schema.devices.c.device, *table.c)
        if label is not None:
            chosen = chosen.where(table.c.label == label)
        counts = self.label_counts(model_digest, guard_digest)
        found: dict[tuple[str, int], list[Row[Any]]] = defaultdict(list)
        with self.read() as db:
            for row in db.execute(chosen.order_by(table.c.slot.desc())):
                found[row.device, row.label].append(row)
        sums: dict[tuple[int, int], tuple[int, int]] = {}
        wanted = slice(None) if label is None else counts.label == label
        columns = (counts.device, counts.label, counts.inputs, counts.flagged)
        for device, of, inputs, flagged in zip(*(column[wanted].tolist() for column in columns), strict=True):
            before = sums.get((device, of), (0, 0))
            sums[device, of] = (before[0] + inputs, before[1] + flagged)
        return [
            DeviceEvidence(
                device=counts.devices[device], label=of, inputs=inputs, flagged=flagged,
                **_features(found[counts.devices[device], of], enough),
            )
            for (device, of), (inputs, flagged) in sorted(sums.items())
        ]  # fmt: skip

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may change rows: committed at the end, rolled back when an error leaves it."""
        with self._engine.connect().execution_options(**{_WRITES: True}) as db, db.begin():
            yield db

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that reads only."""
        with self._engine.connect() as db:
            yield db


def _engine(url: URL, busy_timeout_s: float) -> Engine:
    if url.get_backend_name() != "sqlite":
        # What a batch reads after it waited for another one must be what that one wrote.
        return create_engine(url, isolation_level="READ COMMITTED")
    engine = create_engine(url, connect_args={"timeout": busy_timeout_s})
    _prepare_sqlite(engine, busy_timeout_s)
    return engine


def _prepare_sqlite(engine: Engine, busy_timeout_s: float) -> None:
    """Write-ahead log, commits that reach the disk, and writers that queue up instead of failing half-way."""
    database = engine.url.database
    if database and not Path(database).parent.is_dir():
        raise OSError(f"there is no folder {Path(database).parent}")

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver leaves BEGIN to the listener below
        deadline = time.monotonic() + busy_timeout_s
        for setting in _SQLITE:
            while True:
                try:
                    connection.execute(f"PRAGMA {setting}").close()
                    break
                except sqlite3.OperationalError as error:
                    # Of a change to the write-ahead log, alone, SQLite does not wait for who writes.
                    if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                        raise
                    time.sleep(_AGAIN_S)

    @event.listens_for(engine, "begin")
    def _begin(db: Connection) -> None:
        # A reader that turns into a writer half-way can fail at once; a writer says so from the start and waits.
        writes = db.get_execution_options().get(_WRITES, False)
        db.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _features(rows: Sequence[Row[Any]], enough: int | None) -> dict[str, Any]:
    """The sums over the slots of one device and label, the newest first, until there are enough flagged vectors."""
    through = range(1, len(rows) + 1)
    last = next((n for n in through if enough is not None and sum(r.flagged for r in rows[:n]) >= enough), len(rows))
    return {
        "flagged_vectors": sum(row.flagged for row in rows[:last]),
        "unflagged": sum(row.unflagged for row in rows[:last]),
        **{name: batch.to_sum(getattr(row, name) for row in rows[:last]) for name in batch.VECTORS},
    }


def reason(error: Exception) -> str:
    """Why the database failed, in one line."""
    return str(error.args[0] if error.args else error).partition("\n")[0]
