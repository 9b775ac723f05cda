"""Devices, models and boots become numbers; totals are kept; counts of labels are packed by epoch.

What was stored before falls into epoch 0. The old tables leave once their rows are over.
"""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_NAME, _DIGEST = sa.String(128), sa.String(64)
_MOVED = ("devices", "streams", "reports", "alerts", "evidence", "dead_letters")
_CHUNK = 1000


def upgrade() -> None:
    """Make the new tables, fill them from the old ones, and drop these."""
    db = op.get_bind()
    for name in _MOVED:
        op.rename_table(name, f"old_{name}")
        if db.dialect.name == "postgresql":
            op.execute(f"ALTER INDEX {name}_pkey RENAME TO old_{name}_pkey")
    old = sa.MetaData()
    old.reflect(db, only=[f"old_{name}" for name in _MOVED])
    _Move(db, old.tables, {table.name: table for table in _make()}).all()
    for name in _MOVED:
        op.drop_table(f"old_{name}")
    op.drop_table("schema_version")


class _Move:
    """Copies rows in the order in which they need each other's numbers."""

    def __init__(self, db: sa.Connection, old: Any, new: Any) -> None:
        self._db = db
        self._old = old
        self._new = new
        self._devices: dict[tuple[str, str], int] = {}
        self._models: dict[tuple[str, str, str], int] = {}

    def all(self) -> None:
        """Copy everything."""
        seen: dict[int, int] = {}
        for row in self._rows("devices"):
            number = self._insert("devices", dict(row._mapping))
            self._devices[row.fleet, row.device] = number
            seen[number] = row.last_seen_ms
        for row in self._rows("streams"):
            gaps = row.gaps if isinstance(row.gaps, list) else json.loads(row.gaps)
            self._write(
                "streams",
                {
                    "device_id": self._device(row),
                    "boot": _boot(row.boot),
                    "through_seq": row.through_seq,
                    "last_ms": seen.get(self._device(row), 0),
                    "gaps": json.dumps(gaps, separators=(",", ":")) if gaps else None,
                },
            )
        totals: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_TOTALS, 0))
        for row in self._rows("reports"):
            fields = {name: getattr(row, name) for name in ("inputs", "unchecked", "flagged")}
            self._write("reports", {**self._message(row), **fields})
            for name, value in {"reports": 1, **fields}.items():
                totals[row.fleet][name] += value
        for row in self._rows("alerts"):
            self._write("alerts", {**self._message(row), "at_ms": row.at_ms, "score": row.score, "label": row.label})
            totals[row.fleet]["alerts"] += 1
        self._move_evidence()
        for row in self._rows("dead_letters"):
            fields = {name: getattr(row, name) for name in ("fleet", "at_ms", "topic", "reason", "head")}
            self._write("dead_letters", fields)
            totals[row.fleet]["dead_letters"] = max(totals[row.fleet]["dead_letters"], row.number)
        for fleet, total in totals.items():
            self._write("totals", {"fleet": fleet, "shard": 0, **total})

    def _move_evidence(self) -> None:
        counted: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
        for row in self._rows("evidence"):
            model, device = self._model(row), self._device(row)
            counted[model, device].append((row.label, row.inputs, row.flagged))
            if row.flagged_vectors:
                fields = ("unflagged", "flagged_sum", "unflagged_sum", "unflagged_squares")
                self._write(
                    "features",
                    {
                        "model_id": model,
                        "device_id": device,
                        "label": row.label,
                        "width": len(row.flagged_sum) // 8,
                        "flagged": row.flagged_vectors,
                        **{name: getattr(row, name) for name in fields},
                    },
                )
        for (model, device), labels in counted.items():
            packed = b"".join(struct.pack("<hqq", *label) for label in sorted(labels))
            self._write("label_counts", {"model_id": model, "epoch": 0, "device_id": device, "labels": packed})

    def _message(self, row: sa.Row[Any]) -> dict[str, Any]:
        return {
            "boot": _boot(row.boot),
            "seq": row.seq,
            "stored_ms": row.stored_ms,
            "device_id": self._device(row),
            "model_id": self._model(row),
            "payload": row.payload,
        }

    def _device(self, row: sa.Row[Any]) -> int:
        key = (row.fleet, row.device)
        if key not in self._devices:
            nothing = {"session": 0, "state": "unknown", "sequence": 0, "reason": "", "last_seen_ms": 0}
            self._devices[key] = self._insert("devices", {"fleet": row.fleet, "device": row.device, **nothing})
        return self._devices[key]

    def _model(self, row: sa.Row[Any]) -> int:
        key = (row.fleet, row.model_digest, row.guard_digest)
        if key not in self._models:
            names = ("fleet", "model_digest", "guard_digest")
            self._models[key] = self._insert("models", dict(zip(names, key, strict=True)))
        return self._models[key]

    def _rows(self, name: str) -> Iterator[sa.Row[Any]]:
        """All rows, in the order of ``stored_ms`` where there is one, a chunk at a time."""
        table = self._old[f"old_{name}"]
        order = [table.c.stored_ms] if "stored_ms" in table.c else []
        chosen = sa.select(table).order_by(*order, *table.primary_key).execution_options(yield_per=_CHUNK)
        with self._db.execute(chosen) as rows:
            yield from rows

    def _insert(self, name: str, values: dict[str, Any]) -> int:
        key = self._db.execute(sa.insert(self._new[name]), values).inserted_primary_key
        assert key is not None
        return int(key[0])

    def _write(self, name: str, values: dict[str, Any]) -> None:
        self._db.execute(sa.insert(self._new[name]), values)


_TOTALS = ("reports", "inputs", "unchecked", "flagged", "alerts", "dead_letters")


def _boot(boot: str) -> int:
    number = int(boot, 16)
    return number - (1 << 64) if number >> 63 else number


def _make() -> list[sa.Table]:
    tables: list[sa.Table] = []

    def make(*parts: Any, **options: Any) -> None:
        tables.append(op.create_table(*parts, **options))

    make(
        "devices",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("fleet", _NAME, nullable=False),
        sa.Column("device", _NAME, nullable=False),
        sa.Column("session", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("model_digest", _DIGEST),
        sa.Column("guard_digest", _DIGEST),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("outcome", sa.String(16)),
        sa.Column("outcome_sequence", sa.BigInteger),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("last_seen_ms", sa.BigInteger, nullable=False),
        sa.Column("birth", sa.JSON),
        sa.Column("health", sa.JSON),
        sa.UniqueConstraint("fleet", "device", name="devices_by_name"),
    )
    make(
        "models",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("fleet", _NAME, nullable=False),
        sa.Column("model_digest", _DIGEST, nullable=False),
        sa.Column("guard_digest", _DIGEST, nullable=False),
        sa.UniqueConstraint("fleet", "model_digest", "guard_digest", name="models_by_digest"),
    )
    make(
        "streams",
        _key("device_id"),
        _key("boot", sa.BigInteger),
        sa.Column("through_seq", sa.BigInteger, nullable=False),
        sa.Column("last_ms", sa.BigInteger, nullable=False),
        sa.Column("gaps", sa.Text),
        sqlite_with_rowid=False,
    )
    make(
        "reports",
        *_message(),
        sa.Column("inputs", sa.Integer, nullable=False),
        sa.Column("unchecked", sa.Integer, nullable=False),
        sa.Column("flagged", sa.Integer, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
    )
    make(
        "alerts",
        *_message(),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("score", sa.Float, nullable=False),
        sa.Column("label", sa.Integer, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
    )
    make(
        "days",
        *(_key(name) for name in ("day", "device_id", "model_id")),
        *_sums("reports", "inputs", "unchecked", "flagged"),
        sqlite_with_rowid=False,
    )
    make("totals", sa.Column("fleet", _NAME, primary_key=True), _key("shard"), *_sums(*_TOTALS))
    make(
        "label_counts",
        *(_key(name) for name in ("model_id", "epoch", "device_id")),
        sa.Column("labels", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
    make(
        "features",
        *(_key(name) for name in ("model_id", "device_id", "label")),
        sa.Column("width", sa.Integer, nullable=False),
        *_sums("flagged", "unflagged"),
        *(sa.Column(name, sa.LargeBinary, nullable=False)
          for name in ("flagged_sum", "unflagged_sum", "unflagged_squares")),
    )  # fmt: skip
    op.create_index("features_by_label", "features", ["model_id", "label"])
    make(
        "dead_letters",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("fleet", _NAME, nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("head", sa.LargeBinary, nullable=False),
    )
    op.create_index("dead_letters_by_fleet", "dead_letters", ["fleet", "id"])
    return tables


def _key(name: str, kind: Any = sa.Integer) -> sa.Column[Any]:
    return sa.Column(name, kind, primary_key=True, autoincrement=False)


def _sums(*names: str) -> tuple[sa.Column[int], ...]:
    return tuple(sa.Column(name, sa.BigInteger, nullable=False) for name in names)


def _message() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("id", _ID, primary_key=True),
        sa.Column("boot", sa.BigInteger, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("stored_ms", sa.BigInteger, nullable=False),
        sa.Column("device_id", sa.Integer, nullable=False),
        sa.Column("model_id", sa.Integer, nullable=False),
    )
