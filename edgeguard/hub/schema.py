"""The hub's tables, as SQLAlchemy Core. Revision N of the migrations makes them; those of cases stand in ``tables``.

Rules enforced here:

* what grows with every report is narrow: devices and models stand in its rows by number, a boot as the 64 bits that it
  is, and reports are a log that is only added to at one end and taken from at the other, without any other index;
* nothing that a report changes grows with the number of reports: its writing costs the same in a large database.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()
SLOT = 8
"""Epochs whose feature vectors are one sum."""
# SQLite counts up by itself only in a column that is exactly INTEGER.
_ID = BigInteger().with_variant(Integer, "sqlite")
_NAME, _DIGEST = String(128), String(64)


def _message() -> tuple[Column[int], ...]:
    return (
        Column("id", _ID, primary_key=True),
        Column("boot", BigInteger, nullable=False),
        Column("seq", BigInteger, nullable=False),
        Column("stored_ms", BigInteger, nullable=False),
        Column("device_id", Integer, nullable=False),
        Column("model_id", Integer, nullable=False),
    )


devices = Table(
    "devices",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("fleet", _NAME, nullable=False),
    Column("device", _NAME, nullable=False),
    Column("session", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("model_digest", _DIGEST),
    Column("guard_digest", _DIGEST),
    Column("sequence", BigInteger, nullable=False),
    Column("outcome", String(16)),
    Column("outcome_sequence", BigInteger),
    Column("reason", Text, nullable=False),
    Column("last_seen_ms", BigInteger, nullable=False),
    Column("birth", JSON),
    Column("health", JSON),
    Column("pulse", LargeBinary),
    UniqueConstraint("fleet", "device", name="devices_by_name"),
)
"""``last_seen_ms`` is that of messages other than reports and alerts: theirs stands in ``streams``.

``pulse`` is what became of its last starts and latencies, as JSON: see :class:`edgeguard.hub.ingest.Pulse`.
"""

models = Table(
    "models",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("fleet", _NAME, nullable=False),
    Column("model_digest", _DIGEST, nullable=False),
    Column("guard_digest", _DIGEST, nullable=False),
    UniqueConstraint("fleet", "model_digest", "guard_digest", name="models_by_digest"),
)
"""A number for each model with its guard that a report spoke of."""

streams = Table(
    "streams",
    metadata,
    Column("device_id", Integer, primary_key=True, autoincrement=False),
    Column("boot", BigInteger, primary_key=True, autoincrement=False),
    Column("through_seq", BigInteger, nullable=False),
    Column("last_ms", BigInteger, nullable=False),
    Column("gaps", Text),
    sqlite_with_rowid=False,
)
"""What was received of each boot; ``last_ms`` is when it was last heard of. ``gaps`` is a JSON list, or NULL."""

reports = Table(
    "reports",
    metadata,
    *_message(),
    Column("inputs", Integer, nullable=False),
    Column("unchecked", Integer, nullable=False),
    Column("flagged", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
)

alerts = Table(
    "alerts",
    metadata,
    *_message(),
    Column("at_ms", BigInteger, nullable=False),
    Column("score", Float, nullable=False),
    Column("label", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
)

days = Table(
    "days",
    metadata,
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("device_id", Integer, primary_key=True, autoincrement=False),
    Column("model_id", Integer, primary_key=True, autoincrement=False),
    Column("reports", BigInteger, nullable=False),
    Column("inputs", BigInteger, nullable=False),
    Column("unchecked", BigInteger, nullable=False),
    Column("flagged", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""What reports that have left added up to. A day is the hub's time divided by 86,400,000 ms."""

totals = Table(
    "totals",
    metadata,
    Column("fleet", _NAME, primary_key=True),
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("reports", BigInteger, nullable=False),
    Column("inputs", BigInteger, nullable=False),
    Column("unchecked", BigInteger, nullable=False),
    Column("flagged", BigInteger, nullable=False),
    Column("alerts", BigInteger, nullable=False),
    Column("dead_letters", BigInteger, nullable=False),
)
"""What ever was stored, whatever retention took since. Several rows, so that hubs do not wait for one another."""

label_counts = Table(
    "label_counts",
    metadata,
    Column("model_id", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("device_id", Integer, primary_key=True, autoincrement=False),
    Column("labels", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)
"""What each device counted in an epoch, all labels in one value: see :mod:`edgeguard.hub.tallies`."""

features = Table(
    "features",
    metadata,
    Column("model_id", Integer, primary_key=True, autoincrement=False),
    Column("device_id", Integer, primary_key=True, autoincrement=False),
    Column("label", Integer, primary_key=True, autoincrement=False),
    Column("slot", Integer, primary_key=True, autoincrement=False),
    Column("width", Integer, nullable=False),
    Column("flagged", BigInteger, nullable=False),
    Column("unflagged", BigInteger, nullable=False),
    Column("flagged_sum", LargeBinary, nullable=False),
    Column("unflagged_sum", LargeBinary, nullable=False),
    Column("unflagged_squares", LargeBinary, nullable=False),
    Index("features_by_label", "model_id", "label"),
)
"""Sums of feature vectors, the largest rows of all: by slots of ``SLOT`` epochs, of which two are kept apart. Slot 0 is
all that is older."""

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("fleet", _NAME, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("topic", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("head", LargeBinary, nullable=False),
    Index("dead_letters_by_fleet", "fleet", "id"),
)

cases = Table(
    "cases",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("fleet", _NAME, nullable=False),
    Column("model_digest", _DIGEST, nullable=False),
    Column("label", Integer, nullable=False),
    Column("state", String(32), nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("updated_ms", BigInteger, nullable=False),
    Column("detail", JSON, nullable=False),
    sqlite_autoincrement=True,
)

events = Table(
    "events",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("fleet", _NAME, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("subject", String(256), nullable=False),
    Column("text", Text, nullable=False),
    Column("detail", JSON, nullable=False),
    Index("events_by_fleet", "fleet", "id"),
    sqlite_autoincrement=True,
)
