"""What leaves the database, what stays, and what never changes by it. On SQLite and on PostgreSQL."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sqlalchemy import Table, func, select

from edgeguard.contract.messages import Ack
from edgeguard.hub import bulk, schema, tables
from edgeguard.hub.casebook import Casebook, Move
from edgeguard.hub.cases import Case, Released, Result
from edgeguard.hub.config import StoreConfig
from edgeguard.hub.ingest import Accepted, Rejected
from edgeguard.hub.jobs import Jobs, Work
from edgeguard.hub.retention import CHUNK, Sweeper, sweep
from edgeguard.hub.store import Store
from tests.simulators import fleet
from tests.simulators.fleet import accepted, alert

DAY = 86_400_000
CONFIG = StoreConfig(
    reports_days=7, rollups_days=20, alerts_days=9, events_days=9, keep_epochs=3, boots_kept=2, boots_days=5
)


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    opened = Store(database, fleet="test")
    yield opened
    opened.close()


def rows(store: Store, table: Table) -> int:
    with store.read() as db:
        return db.scalar(select(func.count()).select_from(table)) or 0


def boots(store: Store) -> set[int]:
    with store.read() as db:
        return set(db.scalars(select(schema.streams.c.boot)))


def labels(store: Store) -> list[tuple[int, ...]]:
    counts = store.label_counts(fleet.MODEL, fleet.GUARD)
    columns = (counts.device, counts.label, counts.epoch, counts.inputs, counts.flagged)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


def test_old_reports_become_sums_of_their_days(store: Store) -> None:
    for seq, day in enumerate((1, 1, 2, 9), start=1):
        store.apply([accepted(fleet.report(seq, unchecked=5)), accepted(fleet.report(seq), "d2")], now_ms=day * DAY)
    assert sweep(store, CONFIG, now_ms=10 * DAY).reports == 6
    assert rows(store, schema.reports) == 2
    with store.read() as db:
        found = db.execute(select(schema.days).order_by(schema.days.c.day, schema.days.c.device_id)).all()
    assert [(r.day, r.reports, r.inputs, r.unchecked, r.flagged) for r in found] == [
        (1, 2, 70, 10, 2),
        (1, 2, 60, 0, 2),
        (2, 1, 35, 5, 1),
        (2, 1, 30, 0, 1),
    ]


def test_totals_and_evidence_do_not_change_when_everything_leaves(store: Store) -> None:
    letter = Rejected(topic="t", reason="r", head=b"")
    items: list[Accepted | Rejected] = [accepted(fleet.report(1)), accepted(alert(2)), letter]
    store.apply(items, now_ms=DAY)
    store.apply([accepted(fleet.report(3))], now_ms=4 * DAY)
    before = store.counts()
    first, second = store.evidence(fleet.MODEL, fleet.GUARD)
    sweep(store, msgspec.structs.replace(CONFIG, models_days=2000), now_ms=1000 * DAY)
    assert (rows(store, schema.reports), rows(store, schema.alerts), rows(store, schema.days)) == (0, 0, 0)
    assert store.counts() == before
    after = store.evidence(fleet.MODEL, fleet.GUARD)
    assert [(row.label, row.inputs, row.flagged) for row in after] == [(0, 20, 2), (1, 40, 0)]
    np.testing.assert_array_equal(after[0].flagged_sum, first.flagged_sum)
    assert second.width == after[1].width == 0


def test_sums_of_days_alerts_and_events_leave_at_their_own_age(store: Store) -> None:
    store.apply([accepted(fleet.report(1)), accepted(alert(2))], now_ms=DAY)
    store.add_event("note", "x", "old", at_ms=DAY)
    store.add_event("note", "x", "new", at_ms=5 * DAY)

    def left(day: int) -> tuple[int, ...]:
        sweep(store, CONFIG, now_ms=day * DAY)
        tables = (schema.reports, schema.alerts, schema.events, schema.days)
        return tuple(rows(store, table) for table in tables)

    assert left(8) == (1, 1, 2, 0)
    assert left(9) == (0, 1, 2, 1)
    assert left(11) == (0, 0, 1, 1)
    assert left(21) == (0, 0, 0, 1)
    assert left(22) == (0, 0, 0, 0)


def test_old_epochs_become_one_and_nothing_is_lost(store: Store) -> None:
    for day in range(1, 7):
        store.apply([accepted(fleet.report(day)), accepted(fleet.report(day), "d2")], now_ms=day * DAY)
    assert sweep(store, CONFIG, now_ms=6 * DAY).epochs == 6
    for device in (0, 1):
        assert [row[1:] for row in labels(store) if row[0] == device and row[1] == 0] == [
            (0, 0, 30, 3),
            (0, 4, 10, 1),
            (0, 5, 10, 1),
            (0, 6, 10, 1),
        ]
    assert sweep(store, CONFIG, now_ms=7 * DAY).epochs == 2
    assert sum(row[3] for row in labels(store)) == 2 * 6 * 30


def test_old_slots_of_features_become_one_and_nothing_is_lost(store: Store) -> None:
    days = (1, 9, 17, 25, 26)
    for seq, day in enumerate(days, start=1):
        store.apply([accepted(fleet.report(seq)), accepted(fleet.report(seq), "d2")], now_ms=day * DAY)
    before = store.label_features(fleet.MODEL, fleet.GUARD, 0)
    assert sweep(store, CONFIG, now_ms=26 * DAY).slots == 2
    with store.read() as db:
        assert set(db.scalars(select(schema.features.c.slot))) == {0, 2, 3}
    after = store.label_features(fleet.MODEL, fleet.GUARD, 0)
    assert [row.flagged_vectors for row in after] == [5, 5]
    for one, other in zip(before, after, strict=True):
        for name in ("flagged_sum", "unflagged_sum", "unflagged_squares"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert sweep(store, CONFIG, now_ms=26 * DAY).slots == 0


def test_counts_of_a_model_leave_once_nobody_runs_it_or_was_heard_of_under_it(store: Store) -> None:
    config = msgspec.structs.replace(CONFIG, models_days=30)
    for model in (fleet.MODEL, fleet.OTHER):
        store.apply([accepted(fleet.report(1 + (model == fleet.OTHER), model=model))], now_ms=DAY)
    store.apply([accepted(fleet.birth(model=fleet.OTHER))], now_ms=DAY)
    assert sweep(store, config, now_ms=20 * DAY).models == 0
    assert sweep(store, config, now_ms=40 * DAY).models == 1
    assert store.evidence(fleet.MODEL, fleet.GUARD) == []
    assert [row.inputs for row in store.evidence(fleet.OTHER, fleet.GUARD)] == [10, 20]
    store.apply([accepted(fleet.report(3))], now_ms=41 * DAY)
    assert [row.inputs for row in store.evidence(fleet.MODEL, fleet.GUARD)] == [10, 20]


@pytest.mark.parametrize("heard", ["whole reports", "sums of days", "counts"])
def test_a_model_that_somebody_reported_under_lately_keeps_its_counts(store: Store, heard: str) -> None:
    days = {"reports_days": 365, "rollups_days": 365, "keep_epochs": 100, "models_days": 30}
    if heard != "whole reports":
        days["reports_days"] = 1
    if heard == "counts":
        days["rollups_days"] = 1
    if heard != "counts":
        days["keep_epochs"] = 1
    store.apply([accepted(fleet.report(1))], now_ms=DAY)
    assert sweep(store, msgspec.structs.replace(CONFIG, **days), now_ms=25 * DAY).models == 0
    assert store.evidence(fleet.MODEL, fleet.GUARD)


def test_findings_and_notifications_that_nobody_takes_leave(store: Store) -> None:
    now = {"ms": 10 * DAY}
    book = Casebook(store, clock_ms=lambda: now["ms"], targets=lambda _kind: ["gone"])
    assert book.tell_daily("drift", "signs, fleet", "it drifts")
    sweep(store, CONFIG, now_ms=11 * DAY)
    assert (rows(store, tables.findings), rows(store, tables.outbox)) == (1, 1)
    sweep(store, CONFIG, now_ms=15 * DAY)
    assert (rows(store, tables.findings), rows(store, tables.outbox)) == (0, 0)


def ended(book: Casebook, *, at_ms: int, released: bool = False) -> Case:
    """A record that has come to its end."""
    release = Released(
        target="t", sequence=1, model_digest=fleet.OTHER, guard_digest=fleet.GUARD, replaces=fleet.MODEL, at_ms=1
    )
    return book.save(
        Move(
            case=Case(
                model="signs", model_digest=fleet.MODEL, label=0, state="closed" if released else "dismissed",
                created_ms=at_ms, updated_ms=at_ms, devices=(), flagged=1, inputs=1, p_value=0.1, channels=(),
                job=2 if released else 1, release=release if released else None,
            ),
            text="over",
        )
    )  # fmt: skip


@pytest.mark.parametrize("released", [False, True])
def test_finished_jobs_leave_after_their_case_and_a_released_model_stays(
    store: Store, tmp_path: Path, released: bool
) -> None:
    config = msgspec.structs.replace(CONFIG, jobs_days=30, audit_days=60)
    book = Casebook(store, clock_ms=lambda: DAY)
    case = ended(book, at_ms=DAY, released=released)
    jobs = Jobs(store, owner="hub")
    vector = (0.0,)
    for _ in range(2):
        work = Work(
            case=case.id, model_digest=fleet.MODEL, guard_digest=fleet.GUARD, label=0, flagged_mean=vector,
            unflagged_mean=vector, unflagged_std=vector,
        )  # fmt: skip
        with store.write() as db:
            number = jobs.add(db, work)
        entry = jobs.claim([fleet.MODEL], attempts=3)
        assert entry is not None
        assert jobs.finish(entry, Result(verdict="not_confirmed"), {})
        (tmp_path / "cases" / str(case.id) / f"job-{number}" / "run-1").mkdir(parents=True)
    assert sweep(store, config, now_ms=20 * DAY, folder=tmp_path).jobs == 0
    assert len(list(tmp_path.glob("cases/*/job-*"))) == 2
    assert sweep(store, config, now_ms=40 * DAY, folder=tmp_path).jobs == (1 if released else 2)
    assert [run.name for run in tmp_path.glob("cases/*/job-*")] == (["job-2"] if released else [])
    assert rows(store, tables.audit) == 1
    assert sweep(store, config, now_ms=70 * DAY).audit == 1
    assert book.get(case.id) is not None


@pytest.mark.parametrize(("shared_day", "left"), [(25, 1), (9, 0)])
def test_inputs_that_are_still_being_shared_for_a_dismissed_suspicion_stay(
    store: Store, tmp_path: Path, shared_day: int, left: int
) -> None:
    case = ended(Casebook(store, clock_ms=lambda: DAY), at_ms=DAY)
    columns = ("fleet", "case_id", "digest", "at_ms", "who", "flagged", "counts")
    with store.write() as db:
        given = [("test", case.id, f"{day:064x}", day * DAY, "ada", 1, 1) for day in (2, shared_day)]
        bulk.insert(db, tables.shared, columns, given, conflict="ignore")
    (tmp_path / "shared" / str(case.id)).mkdir(parents=True)
    sweep(store, msgspec.structs.replace(CONFIG, jobs_days=30), now_ms=40 * DAY, folder=tmp_path)
    assert rows(store, tables.shared) == 2 * left
    assert len(list(tmp_path.glob("shared/*"))) == left


def test_epochs_that_were_shorter_once_are_merged_too(database: str) -> None:
    hourly = Store(database, fleet="test", epoch_hours=1)
    hourly.apply([accepted(fleet.report(1))], now_ms=10 * DAY)
    daily = Store(database, fleet="test", epoch_hours=24)
    sweep(daily, CONFIG, now_ms=10 * DAY)
    assert {row[2] for row in labels(daily)} == {0}
    hourly.close()
    daily.close()


def test_more_rows_than_a_chunk_leave_in_one_sweep(store: Store) -> None:
    count = 2 * CHUNK + 7
    for start in range(1, count + 1, CHUNK):
        batch = [accepted(fleet.report(seq)) for seq in range(start, min(start + CHUNK, count + 1))]
        store.apply(batch, now_ms=DAY)
    pauses = itertools.count()
    assert sweep(store, CONFIG, now_ms=30 * DAY, pause=lambda: next(pauses) < 0).reports == count
    assert next(pauses) >= 3
    assert store.counts()["reports"] == count


def test_a_sweep_that_is_ended_early_is_finished_by_the_next(store: Store) -> None:
    for day in range(1, 6):
        store.apply([accepted(fleet.report(day)), accepted(fleet.report(1, boot=f"{day:016x}"))], now_ms=day * DAY)
    before = store.counts()
    ended: list[Any] = [sweep(store, CONFIG, now_ms=100 * DAY, pause=lambda: True) for _ in range(30)]
    assert ended[-1] == sweep(store, CONFIG, now_ms=100 * DAY)
    assert sum(one.reports for one in ended) == 10
    assert {row[2] for row in labels(store)} == {0}
    assert store.counts() == before


def test_boots_that_the_device_is_done_with_leave(store: Store) -> None:
    for number in range(1, 9):
        store.apply([accepted(fleet.report(1, boot=f"{number:016x}"))], now_ms=number * DAY)
    assert sweep(store, CONFIG, now_ms=8 * DAY).boots == 2
    assert boots(store) == {3, 4, 5, 6, 7, 8}


def test_the_boots_heard_last_stay_however_old_they_are(store: Store) -> None:
    for number, day in ((1, 1), (2, 2), (3, 90)):
        store.apply([accepted(fleet.report(1, boot=f"{number:016x}"))], now_ms=day * DAY)
    sweep(store, CONFIG, now_ms=90 * DAY)
    assert boots(store) == {2, 3}


@pytest.mark.parametrize("away_days", [30, 1000])
def test_a_device_that_was_away_repeats_nothing_and_loses_nothing(store: Store, away_days: int) -> None:
    """Ten boots in one day; the acknowledgements of all were lost; after a long time it sends everything again."""
    sent = [fleet.report(seq, boot=f"{number:016x}") for number in range(10) for seq in (1, 2)]
    store.apply([accepted(message) for message in sent], now_ms=DAY)
    back = (1 + away_days) * DAY
    sweep(store, CONFIG, now_ms=back)
    late = fleet.report(3, boot=f"{0:016x}")
    acks = store.apply([accepted(message) for message in (*sent, late)], now_ms=back)
    assert acks[0] == ("d1", Ack(boot=f"{0:016x}", through_seq=3))
    assert store.counts()["reports"] == len(sent) + 1


def test_other_fleets_keep_what_is_theirs(store: Store, database: str) -> None:
    other = Store(database, fleet="other")
    for number in range(1, 5):
        for one in (other, store):
            batch = [accepted(fleet.report(1, boot=f"{number:016x}")), accepted(alert(number))]
            one.apply(batch, now_ms=number * DAY)
            one.add_event("note", "x", "", at_ms=DAY)
    swept = sweep(store, CONFIG, now_ms=100 * DAY)
    assert (swept.reports, swept.alerts, swept.events, swept.epochs) == (4, 4, 4, 4)
    assert rows(store, schema.reports) == rows(store, schema.alerts) == 4
    assert len(other.events()) == 4
    assert {row[2] for row in labels(other)} == {1, 2, 3, 4}
    other.close()


def test_reports_are_stored_while_a_sweep_runs(store: Store) -> None:
    store.apply([accepted(fleet.report(seq)) for seq in range(1, 2001)], now_ms=DAY)
    sweeps = [threading.Thread(target=sweep, args=(store, CONFIG), kwargs={"now_ms": 15 * DAY}) for _ in range(2)]
    for thread in sweeps:
        thread.start()
    for seq in range(2001, 2051):
        store.apply([accepted(fleet.report(seq))], now_ms=14 * DAY)
    for thread in sweeps:
        thread.join(60)
    assert rows(store, schema.reports) == 50
    with store.read() as db:
        assert db.scalar(select(func.sum(schema.days.c.reports))) == 2000
    assert sum(row[3] for row in labels(store)) == store.counts()["inputs"] == 2050 * 30


def test_the_sweeper_sweeps_until_it_is_told_to_end(store: Store) -> None:
    store.apply([accepted(fleet.report(1))], now_ms=DAY)
    sweeper = Sweeper(store, CONFIG, clock_ms=lambda: 30 * DAY, interval_s=0.01)
    sweeper.start()
    fleet.wait_until(lambda: rows(store, schema.reports) == 0)
    sweeper.stop()
    store.apply([accepted(fleet.report(2))], now_ms=DAY)
    time.sleep(0.2)
    assert rows(store, schema.reports) == 1
