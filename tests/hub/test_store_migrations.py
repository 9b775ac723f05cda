"""Databases of older versions become today's; those of newer ones are refused. On SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Engine, MetaData, create_engine, insert, select, text

from edgeguard.contract.messages import Ack, Alert, encode
from edgeguard.errors import ConfigError
from edgeguard.hub import migrations, schema, tables
from edgeguard.hub.ingest import Accepted
from edgeguard.hub.store import Store
from tests.simulators import fleet
from tests.simulators.postgres import Postgres

BOOT = "f" * 16
VECTOR = np.array([1.0, 2.0, 3.0, 7.0])


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without any table."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'hub.db'}"
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.url(postgres.create())


def write_first_version(engine: Engine, *, version: int = 1) -> None:
    """A database as the first version wrote it, with something in each of its tables."""
    with engine.begin() as db:
        config = Config()
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        config.attributes["connection"] = db
        command.upgrade(config, migrations.FIRST)
        db.execute(text("DROP TABLE alembic_version"))
        metadata = MetaData()
        metadata.reflect(db)
        for name, row in first_rows(version):
            db.execute(insert(metadata.tables[name]), row)


def first_rows(version: int) -> list[tuple[str, dict[str, Any]]]:
    who = {"fleet": "test", "device": "d1"}
    digests = {"model_digest": fleet.MODEL, "guard_digest": fleet.GUARD}
    message = {**who, "boot": BOOT, **digests, "stored_ms": 50}
    gone = {**who, "device": "unheard", "boot": fleet.BOOT, "through_seq": 2, "gaps": json.loads("[]")}
    letter = {"fleet": "test", "number": 1500, "at_ms": 1, "topic": "t", "reason": "r", "head": b"h"}
    sums = {
        "flagged_vectors": 1,
        "flagged_sum": VECTOR.tobytes(),
        "unflagged": 0,
        "unflagged_sum": b"",
        "unflagged_squares": b"",
    }
    state = {"session": 3, "state": "online", **digests, "sequence": 2, "outcome": "updated", "outcome_sequence": 2}
    return [
        ("schema_version", {"version": version}),
        ("devices", {**who, **state, "reason": "", "last_seen_ms": 70, "birth": {"a": 1}, "health": None}),
        ("streams", {**who, "boot": BOOT, "through_seq": 5, "gaps": [2, 3]}),
        ("streams", gone),
        ("reports", {**message, "seq": 1, "inputs": 30, "unchecked": 0, "flagged": 1, "started_ms": 1, "ended_ms": 2,
                     "payload": b"{}"}),
        ("alerts", {**message, "seq": 4, "at_ms": 9, "label": 0, "score": 2.0, "payload": b"{}"}),
        ("evidence", {**who, **digests, "label": 0, "inputs": 10, "flagged": 1, **sums}),
        ("evidence", {**who, **digests, "label": 1, "inputs": 20, "flagged": 0, **sums, "flagged_vectors": 0,
                      "flagged_sum": b""}),
        ("dead_letters", letter),
        ("events", {"fleet": "test", "at_ms": 1, "kind": "note", "subject": "x", "text": "y", "detail": {}}),
    ]  # fmt: skip


def differences(db: Connection) -> list[Any]:
    return list(compare_metadata(MigrationContext.configure(db, opts={"compare_type": True}), schema.metadata))


def test_the_migrated_schema_is_the_one_that_the_code_knows(empty: str) -> None:
    assert tables.jobs.metadata is schema.metadata
    store = Store(empty, fleet="test")
    with store.read() as db:
        assert differences(db) == []
    store.close()


def test_what_the_first_version_stored_is_kept(empty: str) -> None:
    engine = create_engine(empty)
    write_first_version(engine)
    store = Store(empty, fleet="test")
    assert store.counts() == {
        "reports": 1, "inputs": 30, "unchecked": 0, "flagged": 1, "alerts": 1, "dead_letters": 1500, "devices": 2,
    }  # fmt: skip
    first = store.devices()[0]
    assert (first.device, first.session, first.outcome, first.last_seen_ms) == ("d1", 3, "updated", 70)
    zero, one = store.evidence(fleet.MODEL, fleet.GUARD)
    assert (zero.inputs, zero.flagged, zero.flagged_sum.tolist()) == (10, 1, VECTOR.tolist())
    assert (one.inputs, one.flagged, one.width) == (20, 0, 0)
    assert store.dead_letters() == [("t", "r", b"h")]
    assert [event.text for event in store.events()] == ["y"]
    with store.read() as db:
        assert db.execute(select(schema.devices.c.birth, schema.devices.c.health)).first() == ({"a": 1}, None)
    store.close()


def test_what_the_first_version_received_is_still_known(empty: str) -> None:
    write_first_version(create_engine(empty))
    store = Store(empty, fleet="test")
    again = [fleet.report(seq, boot=BOOT) for seq in (1, 2, 4, 5)]
    acks = store.apply([Accepted(device="d1", message=m, payload=encode(m)) for m in again], now_ms=99)
    assert acks == [("d1", Ack(boot=BOOT, through_seq=5, gaps=(3,)))]
    assert store.counts()["reports"] == 2
    alert = Alert(
        boot=fleet.BOOT, seq=1, model_digest=fleet.MODEL, guard_digest=fleet.GUARD, at_ms=1, label=0, score=2.0,
        scores={},
    )  # fmt: skip
    store.apply([Accepted(device="unheard", message=alert, payload=encode(alert))], now_ms=99)
    assert store.counts()["alerts"] == 1
    store.close()


@pytest.mark.parametrize("table", ["schema_version", "alembic_version"])
def test_a_database_of_a_newer_version_is_refused(empty: str, table: str) -> None:
    engine = create_engine(empty)
    if table == "schema_version":
        write_first_version(engine, version=99)
    else:
        Store(empty, fleet="test").close()
        with engine.begin() as db:
            db.execute(text("UPDATE alembic_version SET version_num = '0099'"))
    with pytest.raises(ConfigError, match="version 99"):
        Store(empty, fleet="test")


def test_a_failed_migration_leaves_the_old_database(empty: str) -> None:
    engine = create_engine(empty)
    write_first_version(engine)
    with engine.begin() as db:
        db.execute(text("CREATE TABLE label_counts (x INTEGER)"))
    with pytest.raises(ConfigError, match="label_counts"):
        Store(empty, fleet="test")
    with engine.begin() as db:
        assert db.scalar(text("SELECT count(*) FROM reports")) == 1
        db.execute(text("DROP TABLE label_counts"))
    store = Store(empty, fleet="test")
    assert store.counts()["reports"] == 1
    store.close()


def test_hubs_that_start_at_the_same_time_migrate_once(empty: str) -> None:
    write_first_version(create_engine(empty))
    stores: list[Store] = []
    threads = [threading.Thread(target=lambda: stores.append(Store(empty, fleet="test"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [store.counts()["reports"] for store in stores] == [1] * 4
    for store in stores:
        store.close()
