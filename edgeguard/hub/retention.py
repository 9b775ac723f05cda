"""Keeps the database within the bounds of ``[store]``: what is old is added up, and leaves.

Rules enforced here:

* **nothing that was counted is lost to the totals, to the evidence or to the record of what was received**: reports
  become sums a device, model and day; epochs of label counts become one, number 0, and so do slots of feature sums;
* **no report is ever counted twice**: the record of a boot does not leave by age. A device sends the oldest first, and
  sends again what is not acknowledged. So once the hub has heard other boots of it for ``boots_days`` after it last
  heard this one, the device holds nothing more of it; a device that was off for a month, or a year, was not heard, and
  nothing of it leaves meanwhile. Only then, and only beyond the ``boots_kept`` boots heard last, does a record leave;
* counts and feature sums of a model leave only when no device says that it runs it, and none was heard of for
  ``models_days``; its number stays, and a device that comes back to it begins anew;
* a finished job leaves with its files ``jobs_days`` after its case has ended, but the one whose model was released;
* a folder of a run whose job is not in the database leaves; what nobody was told within days is not told any more;
* ingest never waits long: each transaction takes few rows, and there is a pause after it;
* a sweep that is ended at any point goes on with the next one; hubs that share a database may sweep at the same time.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Select, Table, delete, exists, func, or_, select
from sqlalchemy.exc import SQLAlchemyError

from edgeguard.hub import batch, bulk, schema, tables, tallies
from edgeguard.hub.cases import OPEN, Case
from edgeguard.hub.config import StoreConfig
from edgeguard.hub.store import Store, reason

CHUNK = 500
PAUSE_S = 0.05
INTERVAL_S = 3600.0
OUTBOX_DAYS = 4
"""Longer than whoever sends notifications tries: see :mod:`edgeguard.hub.notify`."""
_DAY_MS = 86_400_000

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Swept:
    """How many rows left."""

    reports: int
    alerts: int
    events: int
    days: int
    epochs: int
    slots: int
    boots: int
    audit: int
    told: int
    jobs: int
    models: int


def sweep(
    store: Store,
    config: StoreConfig,
    *,
    now_ms: int,
    folder: Path | None = None,
    pause: Callable[[], bool] = lambda: False,
) -> Swept:
    """Let everything leave that is older than the configuration keeps.

    Args:
        now_ms: the hub's time.
        folder: this hub's state folder, with the folders of its runs and the inputs that owners shared.
        pause: called after each transaction, to wait a little; True ends the sweep.

    Raises:
        SQLAlchemyError: the database failed; what was done so far is whole.
    """
    work = _Sweep(store, now_ms, pause)
    return Swept(
        reports=work.trim(schema.reports, "stored_ms", config.reports_days),
        alerts=work.trim(schema.alerts, "stored_ms", config.alerts_days),
        events=work.trim(schema.events, "at_ms", config.events_days),
        days=work.drop_days(config.rollups_days),
        epochs=work.merge_epochs(config.keep_epochs),
        slots=work.merge_slots(),
        boots=work.drop_boots(config.boots_kept, config.boots_days * _DAY_MS),
        audit=work.trim(tables.audit, "at_ms", config.audit_days),
        told=work.trim(tables.outbox, "created_ms", OUTBOX_DAYS) + work.drop_findings(),
        jobs=work.drop_jobs(config.jobs_days, folder),
        models=work.drop_models(config.models_days),
    )


class _Sweep:
    def __init__(self, store: Store, now_ms: int, pause: Callable[[], bool]) -> None:
        self._store = store
        self._now_ms = now_ms
        self._pause = pause
        self._ended = False
        devices, models = schema.devices, schema.models
        self._devices = select(devices.c.id).where(devices.c.fleet == store.fleet)
        self._models = select(models.c.id).where(models.c.fleet == store.fleet)

    def trim(self, table: Table, clock: str, days: int) -> int:
        """Rows of a log leave from its old end. It is in the order of the clock, but for jumps of the hub's own."""
        cutoff = self._now_ms - days * _DAY_MS
        mine = table.c.fleet == self._store.fleet if "fleet" in table.c else table.c.device_id.in_(self._devices)
        gone = last = 0
        while not self._ended:
            chunk = select(table.c.id, (table.c[clock] < cutoff).label("old"), mine.label("mine"))
            rows = self._all(chunk.where(table.c.id > last).order_by(table.c.id).limit(CHUNK))
            ours = [row for row in rows if row.mine]
            old = [row.id for row in ours if row.old]
            if not rows or (ours and not old):
                break
            last = rows[-1].id
            if old:
                gone += self._take(table, table.c.id.between(old[0], old[-1]) & (table.c[clock] < cutoff) & mine)
        return gone

    def drop_days(self, days: int) -> int:
        """Sums of days leave a day at a time."""
        table = schema.days
        cutoff = (self._now_ms - days * _DAY_MS) // _DAY_MS
        mine = table.c.device_id.in_(self._devices)
        gone = 0
        for (day,) in self._all(select(table.c.day).where(table.c.day < cutoff, mine).distinct()):
            if not self._ended:
                with self._store.write() as db:
                    gone += db.execute(delete(table).where(table.c.day == day, mine)).rowcount
                self._wait()
        return gone

    def merge_epochs(self, kept: int) -> int:
        """Old epochs become epoch 0, and so do those of the future: their length was another when they were counted."""
        table = schema.label_counts
        now = self._store.epoch(self._now_ms)
        old = (table.c.epoch > 0) & or_(table.c.epoch <= now - kept, table.c.epoch > now + 1)
        gone = 0
        for model, epoch in self._all(
            select(table.c.model_id, table.c.epoch).where(table.c.model_id.in_(self._models), old).distinct()
        ):
            of = (table.c.model_id == model) & (table.c.epoch == epoch)
            while not self._ended:
                devices = [row.device_id for row in self._all(select(table.c.device_id).where(of).limit(CHUNK))]
                if not devices:
                    break
                self._merge(model, epoch, sorted(devices))
                gone += len(devices)
        return gone

    def merge_slots(self) -> int:
        """Feature sums of slots before the last one become slot 0, and so do those of the future."""
        table = schema.features
        now = self._store.epoch(self._now_ms) // schema.SLOT
        old = (table.c.slot > 0) & or_(table.c.slot < now - 1, table.c.slot > now + 1)
        found = select(table.c.model_id, table.c.device_id, table.c.label, table.c.slot, table.c.width)
        gone = 0
        while not self._ended:
            rows = self._all(found.where(table.c.model_id.in_(self._models), old).limit(CHUNK))
            if not rows:
                break
            with self._store.write() as db:
                bulk.lock(db, schema.devices, "id", sorted({row.device_id for row in rows}))
                for model, device, label, _, width in rows:
                    batch.merge_features(db, (model, device, label), old, width)
            gone += len(rows)
            self._wait()
        return gone

    def drop_boots(self, kept: int, silence_ms: int) -> int:
        """Records of boots leave that are beyond the ``kept`` ones heard last, and that the device is done with."""
        table = schema.streams
        many = (
            select(table.c.device_id)
            .where(table.c.device_id.in_(self._devices))
            .group_by(table.c.device_id)
            .having(func.count() > kept)
        )
        gone = 0
        for (device,) in self._all(many):
            if self._ended:
                break
            with self._store.write() as db:
                bulk.lock(db, schema.devices, "id", [device])
                of = table.c.device_id == device
                heard = db.scalars(select(table.c.last_ms).where(of).order_by(table.c.last_ms.desc())).all()
                if len(heard) > kept:
                    # At least the time after the last one kept: boots heard at the same time leave together or stay.
                    before = min(heard[kept - 1], heard[0] - silence_ms)
                    gone += db.execute(delete(table).where(of, table.c.last_ms < before)).rowcount
            self._wait()
        return gone

    def drop_findings(self) -> int:
        """A finding is told again after a day: when it was told last is of no use any more."""
        table = tables.findings
        old = (table.c.fleet == self._store.fleet, table.c.told_ms < self._now_ms - 2 * _DAY_MS)
        with self._store.write() as db:
            gone = db.execute(delete(table).where(*old)).rowcount
        self._wait()
        return gone

    def drop_jobs(self, days: int, folder: Path | None) -> int:
        """Jobs of cases that have ended, each with its files; inputs shared for them, where none is newer; folders of
        jobs not there."""
        table, cases = tables.jobs, schema.cases
        since_ms = self._now_ms - days * _DAY_MS
        ended = (cases.c.state.not_in(OPEN), cases.c.updated_ms < since_ms)
        gone = 0
        chosen = select(cases.c.id, cases.c.detail).where(cases.c.fleet == self._store.fleet, *ended)
        for number, detail in self._all(chosen):
            if self._ended:
                return gone
            case = msgspec.convert(detail, Case)
            kept = case.job if case.release is not None else None
            self._drop_shared(number, since_ms, folder)
            theirs = (table.c.fleet == self._store.fleet, table.c.case_id == number)
            over = (table.c.state.in_(("done", "failed")), table.c.id != (kept or 0))
            if self._all(select(table.c.id).where(*theirs, *over).limit(1)):
                with self._store.write() as db:
                    gone += db.execute(delete(table).where(*theirs, *over)).rowcount
                self._wait()
        runs = list(folder.glob("cases/*/job-*")) if folder is not None else []  # first: the job is there before it
        known = {row.id for row in self._all(select(table.c.id).where(table.c.fleet == self._store.fleet))}
        for run in runs:
            job = run.name.removeprefix("job-")
            if job.isdecimal() and int(job) not in known:
                shutil.rmtree(run, ignore_errors=True)
        return gone

    def _drop_shared(self, case: int, since_ms: int, folder: Path | None) -> None:
        table = tables.shared
        theirs = (table.c.fleet == self._store.fleet, table.c.case_id == case)
        newest = self._all(select(func.max(table.c.at_ms)).where(*theirs))[0][0]
        if newest is not None and newest >= since_ms:
            return
        if newest is not None:
            with self._store.write() as db:
                db.execute(delete(table).where(*theirs))
            self._wait()
        if folder is not None:
            shutil.rmtree(folder / "shared" / str(case), ignore_errors=True)

    def drop_models(self, days: int) -> int:
        """Counts and feature sums under models that nobody runs any more."""
        table, features, devices, models = schema.label_counts, schema.features, schema.devices, schema.models
        since_ms = self._now_ms - days * _DAY_MS
        epoch = self._store.epoch(since_ms)
        run = exists().where(
            devices.c.fleet == models.c.fleet,
            devices.c.model_digest == models.c.model_digest,
            devices.c.guard_digest == models.c.guard_digest,
        )
        heard = (
            exists().where(table.c.model_id == models.c.id, table.c.epoch > epoch)
            | exists().where(schema.days.c.model_id == models.c.id, schema.days.c.day >= since_ms // _DAY_MS)
        )  # fmt: skip
        there = exists().where(table.c.model_id == models.c.id)
        gone = 0
        for (model,) in self._all(select(models.c.id).where(models.c.id.in_(self._models), there, ~run, ~heard)):
            # Whole reports are kept for days, and have no index but their number: asked last.
            if self._all(select(schema.reports.c.id).where(schema.reports.c.model_id == model).limit(1)):
                continue
            while not self._ended:
                old = (table.c.model_id == model) & (table.c.epoch <= epoch)
                rows = self._all(select(table.c.device_id).where(old).distinct().limit(CHUNK))
                if not rows:
                    break
                theirs = sorted(row.device_id for row in rows)
                with self._store.write() as db:
                    bulk.lock(db, devices, "id", theirs)
                    gone += db.execute(delete(table).where(old, table.c.device_id.in_(theirs))).rowcount
                    sums = (features.c.model_id == model) & (features.c.slot <= epoch // schema.SLOT)
                    db.execute(delete(features).where(sums, features.c.device_id.in_(theirs)))
                self._wait()
        return gone

    def _take(self, table: Table, chosen: Any) -> int:
        """Delete rows; reports are added to the sums of their days in the same transaction."""
        with self._store.write() as db:
            if table is not schema.reports:
                gone = db.execute(delete(table).where(chosen)).rowcount
            else:
                columns = (table.c.stored_ms, table.c.device_id, table.c.model_id, *(table.c[n] for n in _SUMMED))
                sums: dict[tuple[int, int, int], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
                rows = db.execute(delete(table).where(chosen).returning(*columns)).all()
                for stored_ms, device, model, *counted in rows:
                    total = sums[stored_ms // _DAY_MS, device, model]
                    for i, value in enumerate((1, *counted)):
                        total[i] += value
                columns_of_days = ("day", "device_id", "model_id", "reports", *_SUMMED)
                values = [(*key, *total) for key, total in sorted(sums.items())]
                bulk.insert(db, schema.days, columns_of_days, values, conflict="add")
                gone = len(rows)
        self._wait()
        return gone

    def _merge(self, model: int, epoch: int, devices: list[int]) -> None:
        table = schema.label_counts
        key: bulk.Names = ("model_id", "epoch", "device_id")
        with self._store.write() as db:
            bulk.lock(db, schema.devices, "id", devices)
            wanted = [(model, number, device) for device in devices for number in (0, epoch)]
            rows = bulk.read(db, table, key, wanted, ("epoch", "device_id", "labels"))
            found = {(row.epoch, row.device_id): row.labels for row in rows}
            parts = tallies.unpack([found.get((epoch, device), b"") for device in devices])
            more = list(zip(*(part.tolist() for part in parts), strict=True))
            merged = tallies.add([found.get((0, device), b"") for device in devices], more)
            totals = [(model, 0, device, labels) for device, labels in zip(devices, merged, strict=True)]
            bulk.insert(db, table, (*key, "labels"), totals, conflict="replace")
            of = (table.c.model_id == model) & (table.c.epoch == epoch)
            db.execute(delete(table).where(of, table.c.device_id.in_(devices)))
        self._wait()

    def _all(self, chosen: Select[Any]) -> list[Any]:
        with self._store.read() as db:
            return list(db.execute(chosen))

    def _wait(self) -> None:
        self._ended = self._pause() or self._ended


_SUMMED = ("inputs", "unchecked", "flagged")


class Sweeper:
    """Sweeps in a thread, once at the start and then every ``interval_s`` seconds.

    Args:
        clock_ms: the hub's clock.
        folder: as for :func:`sweep`.
    """

    def __init__(
        self,
        store: Store,
        config: StoreConfig,
        *,
        clock_ms: Callable[[], int],
        folder: Path | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._store = store
        self._config = config
        self._clock_ms = clock_ms
        self._folder = folder
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the transaction at hand."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                swept = sweep(
                    self._store,
                    self._config,
                    now_ms=self._clock_ms(),
                    folder=self._folder,
                    pause=lambda: self._stopping.wait(PAUSE_S),
                )
                log.info("retention: %s", swept)
            except SQLAlchemyError as error:
                log.warning("retention: %s; trying again later", reason(error))
            self._stopping.wait(self._interval_s)
