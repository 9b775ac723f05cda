"""How large the hub's database becomes: bytes a row, measured, and what a year of a fleet takes.

    python -m benchmarks.store_size [--devices 10000] [--json benchmarks/results/store_size.json]

A hub's store is filled on SQLite and on PostgreSQL with the reports of ``DEVICES`` devices over ``DAYS`` days, and each
table with its indexes is measured. PostgreSQL is vacuumed once a day of the fleet: its own daemon, which does so all
along, would find no time here. ``rows`` says how many rows a fleet has after a year under a configuration, and
``size`` multiplies. What is assumed stands in ``Fleet`` and is written beside the result.

Not in it: SQLite's write-ahead log (a few MiB; more while a long read holds it), PostgreSQL's own log
(``max_wal_size``, 1 GiB by default) and free pages within files.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, create_engine, func, make_url, select, text

from edgeguard.contract.messages import Alert, Birth, Health, LabelCount, LabelEvidence, Message, Report, encode
from edgeguard.contract.scores import BINS
from edgeguard.hub import schema
from edgeguard.hub.config import StoreConfig
from edgeguard.hub.ingest import Accepted
from edgeguard.hub.retention import sweep
from edgeguard.hub.store import Store
from tests.simulators.postgres import Postgres

DEVICES, DAYS, WINDOWS = 300, 20, 6
BATCH = 1000
DAY_MS = 86_400_000
MODEL, GUARD = "a" * 64, "b" * 64
TABLES = (
    schema.reports, schema.alerts, schema.days, schema.streams, schema.label_counts, schema.features, schema.devices,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What a fleet does.

    Attributes:
        windows: reports a device and day; 288 is one each five minutes, all day.
        featured: share of the windows in which an input of one label was flagged, so that features are reported.
        alerts: alerts a device and day.
        boots: starts a device and day.
        labels: classes of the model, each of them predicted in each window.
        width: features of the model.
        models: how many models, with their guards, each device runs in the course of the year.
    """

    devices: int = 10_000
    windows: int = 288
    featured: float = 0.3
    alerts: int = 3
    boots: int = 1
    labels: int = 10
    width: int = 200
    models: int = 4


def rows(fleet: Fleet, config: StoreConfig, *, days: int = 365) -> dict[str, int]:
    """How many rows each table has after so many days."""
    devices = fleet.devices
    boots = min(days * fleet.boots, max(config.boots_kept, config.boots_days * fleet.boots))
    epochs = min(config.keep_epochs, days * 24 // config.epoch_hours)
    return {
        "reports": devices * fleet.windows * min(days, config.reports_days),
        "alerts": devices * fleet.alerts * min(days, config.alerts_days),
        "days": devices * min(days, config.rollups_days),
        "streams": devices * boots,
        "label_counts": devices * (epochs + fleet.models),
        # The model that runs has two slots beside what is older.
        "features": devices * fleet.labels * (fleet.models + 2),
        "devices": devices,
    }


def size(fleet: Fleet, config: StoreConfig, bytes_a_row: Mapping[str, float], *, days: int = 365) -> dict[str, int]:
    """How many bytes each table takes after so many days."""
    return {name: round(number * bytes_a_row[name]) for name, number in rows(fleet, config, days=days).items()}


def measure(store: Store, fleet: Fleet, vacuum: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Fill a store, and measure the rows of each table: how many there were and bytes a row, indexes included.

    Args:
        vacuum: called at the end of each day of the fleet.
    """
    source = random.Random(0)
    boots = {}
    pending: list[Accepted] = []
    for window in range(DAYS * WINDOWS):
        now_ms = (20_000 * WINDOWS + window) * DAY_MS // WINDOWS
        for number in range(DEVICES):
            device = f"device-{number:05d}"
            if window % WINDOWS == 0:
                boots[device] = f"{source.getrandbits(64):016x}"
                pending += [_accepted(device, message) for message in _greeting(boots[device], window)]
            seq = 2 * (window % WINDOWS) + 1
            pending.append(_accepted(device, _report(source, fleet, boots[device], seq, now_ms)))
            if window % 2:
                pending.append(_accepted(device, _alert(boots[device], seq + 1, now_ms)))
        for start in range(0, len(pending), BATCH):
            store.apply(pending[start : start + BATCH], now_ms=now_ms)
        pending.clear()
        if window % WINDOWS == WINDOWS - 1:
            vacuum()
    before = _measure(store)
    # All but the last days' reports become sums, so that these can be measured too; nothing else leaves.
    for day in range(DAYS):
        sweep(store, StoreConfig(reports_days=DAYS - day, keep_epochs=1000, boots_kept=1000), now_ms=now_ms)
        vacuum()
    return before | {"days": _measure(store)["days"]}


def _measure(store: Store) -> dict[str, dict[str, float]]:
    found = {}
    with store.read() as db:
        for table in TABLES:
            count = db.scalar(select(func.count()).select_from(table)) or 0
            taken = _bytes(db, table.name)
            found[table.name] = {"rows": count, "bytes_a_row": round(taken / count, 1) if count else 0.0}
    return found


def _vacuum(url: str) -> None:
    if make_url(url).get_backend_name() == "postgresql":
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as db:
            db.execute(text("VACUUM"))
        engine.dispose()


def _bytes(db: Connection, table: str) -> int:
    if db.dialect.name == "sqlite":
        pages = "SELECT sum(pgsize) FROM dbstat WHERE name IN (SELECT name FROM sqlite_schema WHERE tbl_name = :table)"
        return int(db.scalar(text(pages), {"table": table}) or 0)
    return int(db.scalar(text("SELECT pg_total_relation_size(CAST(:table AS regclass))"), {"table": table}) or 0)


def _accepted(device: str, message: Message) -> Accepted:
    return Accepted(device=device, message=message, payload=encode(message))


def _greeting(boot: str, session: int) -> tuple[Birth, Health]:
    birth = Birth(
        session=session, boot=boot, edgeguard="0.2.0", python="3.11.2", board="Raspberry Pi 4 Model B Rev 1.5",
        runtime="litert", runtime_version="2.0.3", model_digest=MODEL, guard_digest=GUARD, file_digest="c" * 64,
        sequence=3, detectors=("linf", "l1", "logit"), capabilities=("ping", "rank", "vote"),
    )  # fmt: skip
    health = Health(
        session=session, boot=boot, rss_bytes=80_000_000, spooled=3, inputs=100_000, p50_us=1234.5, temperature_c=51.2
    )
    return birth, health


def _report(source: random.Random, fleet: Fleet, boot: str, seq: int, now_ms: int) -> Report:
    special = source.randrange(fleet.labels) if source.random() < fleet.featured else None
    labels = tuple(LabelCount(label=i, inputs=30, flagged=int(i == special)) for i in range(fleet.labels))
    evidence: tuple[LabelEvidence, ...] = ()
    if special is not None:
        mean, clean, std = (tuple(round(source.uniform(0, 9), 4) for _ in range(fleet.width)) for _ in range(3))
        evidence = (
            LabelEvidence(
                label=special, flagged=1, unflagged=29, flagged_mean=mean, unflagged_mean=clean, unflagged_std=std
            ),
        )
    flagged = int(special is not None)
    inputs = 30 * fleet.labels
    return Report(
        boot=boot, seq=seq, model_digest=MODEL, guard_digest=GUARD, started_ms=now_ms - 300_000, ended_ms=now_ms,
        inputs=inputs, unchecked=0, labels=labels, histogram=(inputs - flagged, *(0,) * (BINS - 2), flagged),
        evidence=evidence,
    )  # fmt: skip


def _alert(boot: str, seq: int, now_ms: int) -> Alert:
    return Alert(
        boot=boot, seq=seq, model_digest=MODEL, guard_digest=GUARD, at_ms=now_ms, label=3, score=1.234567,
        scores={"linf": 1.234567, "l1": 0.81234, "logit": 0.4321}, p_value=0.0012,
    )  # fmt: skip


def main() -> int:
    """Measure both databases and say what a year takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=Fleet.devices, help="devices of the fleet whose year is told")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    fleet, config = Fleet(devices=options.devices), StoreConfig()
    report = _report(random.Random(0), fleet, "0" * 16, 1, DAY_MS)
    found: dict[str, Any] = {
        "fleet": asdict(fleet),
        "retention": {key: value for key, value in msgspec.to_builtins(config).items() if key != "url"},
        "payload_bytes": {
            "without features": len(encode(msgspec.structs.replace(report, evidence=()))),
            "with features": len(encode(_report(random.Random(0), Fleet(featured=1.0), "0" * 16, 1, DAY_MS))),
        },
        "rows_after_a_year": rows(fleet, config),
    }
    cluster = Postgres()
    cluster.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            urls = {"sqlite": f"sqlite:///{folder}/hub.db", "postgresql": cluster.url(cluster.create())}
            for name, url in urls.items():
                store = Store(url, fleet="size")
                measured = measure(store, fleet, partial(_vacuum, url))
                store.close()
                bytes_a_row = {table: value["bytes_a_row"] for table, value in measured.items()}
                year = size(fleet, config, bytes_a_row)
                found[name] = {
                    "measured": measured,
                    "year_bytes": year,
                    "year_gib": round(sum(year.values()) / 2**30, 2),
                    "year_gib_without_retention": round(
                        sum(size(fleet, _everything(), bytes_a_row).values()) / 2**30, 2
                    ),
                }
    finally:
        cluster.stop()
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _everything() -> StoreConfig:
    return StoreConfig(
        reports_days=36_500, rollups_days=1, alerts_days=36_500, events_days=36_500, keep_epochs=1000,
        boots_kept=100_000,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
