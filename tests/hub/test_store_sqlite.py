"""What SQLite alone must do: a file that is locked, damaged or of another kind, and commits that reach the disk."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from edgeguard.contract.messages import encode
from edgeguard.errors import ConfigError
from edgeguard.hub.ingest import Accepted
from edgeguard.hub.store import Store
from tests.simulators import fleet


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'hub.db'}"


def report() -> Accepted:
    return Accepted(device="d1", message=fleet.report(), payload=encode(fleet.report()))


def test_nothing_is_changed_when_the_database_is_locked(tmp_path: Path) -> None:
    store = Store(url(tmp_path), fleet="test", busy_timeout_s=0.1)
    with sqlite3.connect(tmp_path / "hub.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="locked"):
            store.apply([report()], now_ms=1)
        other.execute("ROLLBACK")
    assert store.counts()["reports"] == 0
    assert store.apply([report()], now_ms=1)
    store.close()


def test_a_database_that_is_up_to_date_is_opened_while_another_hub_writes(tmp_path: Path) -> None:
    Store(url(tmp_path), fleet="test").close()
    with sqlite3.connect(tmp_path / "hub.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        Store(url(tmp_path), fleet="test", busy_timeout_s=0.1).close()


def test_commits_reach_the_disk(tmp_path: Path) -> None:
    store = Store(url(tmp_path), fleet="test")
    with store.read() as db:
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    store.close()


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "hub.db"
    file.write_bytes(b"dear diary, " * 1000)
    with pytest.raises(ConfigError, match="not a database"):
        Store(url(tmp_path), fleet="test")
    assert file.read_bytes() == b"dear diary, " * 1000
