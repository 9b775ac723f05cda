"""Keeps the database within the bounds of ``[store]``: what is old is added up, and leaves.

Rules enforced here:

* **nothing that was counted is lost to the totals, to the evidence or to the record of what was received**: reports
  become sums a device, model and day; epochs of label counts become one, number 0;
* **no report is ever counted twice**: the record of a boot does not leave by age. A device sends the oldest first, and
  sends again what is not acknowledged. So once the hub has heard other boots of it for ``boots_days`` after it last
  heard this one, the device holds nothing more of it; a device that was off for a month, or a year, was not heard, and
  nothing of it leaves meanwhile. Only then, and only beyond the ``boots_kept`` boots heard last, does a record leave;
* ingest never waits long: each transaction takes few rows, and there is a pause after it;
* a sweep that is ended at any point goes on with the next one; hubs that share a database may sweep at the same time.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, Table, delete, func, or_, select
from sqlalchemy.exc import SQLAlchemyError

from edgeguard.hub import bulk, schema, tallies
from edgeguard.hub.config import StoreConfig
from edgeguard.hub.store import Store, reason

CHUNK = 500
PAUSE_S = 0.05
INTERVAL_S = 3600.0
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
    boots: int


def sweep(store: Store, config: StoreConfig, *, now_ms: int, pause: Callable[[], bool] = lambda: False) -> Swept:
    """Let everything leave that is older than the configuration keeps.

    Args:
        now_ms: the hub's time.
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
        boots=work.drop_boots(config.boots_kept, config.boots_days * _DAY_MS),
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
    """

    def __init__(
        self, store: Store, config: StoreConfig, *, clock_ms: Callable[[], int], interval_s: float = INTERVAL_S
    ) -> None:
        self._store = store
        self._config = config
        self._clock_ms = clock_ms
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
                    self._store, self._config, now_ms=self._clock_ms(), pause=lambda: self._stopping.wait(PAUSE_S)
                )
                log.info("retention: %s", swept)
            except SQLAlchemyError as error:
                log.warning("retention: %s; trying again later", reason(error))
            self._stopping.wait(self._interval_s)
