"""A hub that is killed at any moment leaves each batch whole, or nothing of it. On SQLite and on PostgreSQL."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from sqlalchemy import func, select, text

from edgeguard.contract.messages import Alert, encode
from edgeguard.hub import schema
from edgeguard.hub.ingest import Accepted, Rejected
from edgeguard.hub.store import Store
from tests.simulators import fleet

KILLS = 8
DEVICES = tuple(f"d{i}" for i in range(10))


def batch(number: int) -> Iterator[Accepted | Rejected]:
    """Batch ``number``: of each device one report, one alert and one message that cannot be taken."""
    for device in DEVICES:
        alert = Alert(
            boot=fleet.BOOT, seq=3 * number + 2, model_digest=fleet.MODEL, guard_digest=fleet.GUARD, at_ms=1, label=0,
            score=2.0, scores={},
        )  # fmt: skip
        for message in (fleet.report(3 * number + 1), alert):
            yield Accepted(device=device, message=message, payload=encode(message))
        yield Rejected(topic="t", reason="r", head=b"", identity=(device, fleet.BOOT, 3 * number + 3))


def hub(url: str, first: int, told: Connection) -> None:
    """Apply one batch after the other, and tell of each one once it is committed. Runs in a process of its own."""
    store = Store(url, fleet="test")
    for number in range(first, first + 10_000):
        store.apply(list(batch(number)), now_ms=1)
        told.send(number)


def run_and_kill(url: str, first: int, after_s: float) -> int:
    """Start a hub, kill it ``after_s`` seconds after its first batch, and return the last batch that it told of."""
    listening, told = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=hub, args=(url, first, told), daemon=True)
    process.start()
    told.close()
    last = listening.recv()
    time.sleep(after_s)
    process.kill()
    process.join()
    try:
        while True:
            last = listening.recv()
    except EOFError:
        return int(last)


def wait_until_alone(store: Store) -> None:
    """PostgreSQL finishes the statement of a client that is gone, which may be its commit."""
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with store.read() as db:
        while db.dialect.name == "postgresql" and db.scalar(text(others)):
            time.sleep(0.01)


def stored(store: Store) -> dict[str, Any]:
    """What each table says of the number of batches."""
    with store.read() as db:
        rows = {
            table.name: db.execute(select(func.count()).select_from(table)).scalar_one()
            for table in (schema.reports, schema.alerts)
        }
        through = set(db.scalars(select(schema.streams.c.through_seq)))
    counts = store.counts()
    evidence = store.evidence(fleet.MODEL, fleet.GUARD)
    devices = len(DEVICES)
    return {
        "reports": rows["reports"] / devices,
        "alerts": rows["alerts"] / devices,
        "received": max(through, default=0) / 3 if len(through) <= 1 else through,
        "total of reports": counts["reports"] / devices,
        "total of alerts": counts["alerts"] / devices,
        "total of dead letters": counts["dead_letters"] / devices,
        "counts": sum(row.inputs for row in evidence) / 30 / devices,
        "features": sum(float(row.flagged_sum[3]) for row in evidence if row.width) / 7 / devices,
    }


def test_a_batch_is_whole_or_not_there_whenever_the_hub_is_killed(database: str) -> None:
    moments = random.Random(1)
    number = 0
    for _ in range(KILLS):
        told = run_and_kill(database, number, moments.uniform(0.0, 0.1))
        store = Store(database, fleet="test")
        wait_until_alone(store)
        found = stored(store)
        number = int(found["reports"])
        assert set(found.values()) == {number}, found
        assert number in (told + 1, told + 2), "a batch that was told of is gone, or one is there that was never sent"
        store.close()
