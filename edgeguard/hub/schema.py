"""The hub's tables, as SQLAlchemy Core. Nothing here belongs to one database only."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, Text

VERSION = 1

metadata = MetaData()
# SQLite counts up by itself only in a column that is exactly INTEGER.
_ID = BigInteger().with_variant(Integer, "sqlite")
_NAME, _DIGEST, _BOOT = String(128), String(64), String(16)


def _identity() -> tuple[Column[str], ...]:
    return (Column("fleet", _NAME, primary_key=True), Column("device", _NAME, primary_key=True))


def _message() -> tuple[Column[str] | Column[int], ...]:
    return (
        *_identity(),
        Column("boot", _BOOT, primary_key=True),
        Column("seq", BigInteger, primary_key=True),
        Column("model_digest", _DIGEST, nullable=False),
        Column("guard_digest", _DIGEST, nullable=False),
    )


schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True))

devices = Table(
    "devices",
    metadata,
    *_identity(),
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
)

streams = Table(
    "streams",
    metadata,
    *_identity(),
    Column("boot", _BOOT, primary_key=True),
    Column("through_seq", BigInteger, nullable=False),
    Column("gaps", JSON, nullable=False),
)

reports = Table(
    "reports",
    metadata,
    *_message(),
    Column("inputs", BigInteger, nullable=False),
    Column("unchecked", BigInteger, nullable=False),
    Column("flagged", BigInteger, nullable=False),
    Column("started_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger, nullable=False),
    Column("stored_ms", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
)

alerts = Table(
    "alerts",
    metadata,
    *_message(),
    Column("at_ms", BigInteger, nullable=False),
    Column("label", Integer, nullable=False),
    Column("score", Float, nullable=False),
    Column("stored_ms", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
)

evidence = Table(
    "evidence",
    metadata,
    Column("fleet", _NAME, primary_key=True),
    Column("model_digest", _DIGEST, primary_key=True),
    Column("guard_digest", _DIGEST, primary_key=True),
    Column("device", _NAME, primary_key=True),
    Column("label", Integer, primary_key=True),
    Column("inputs", BigInteger, nullable=False),
    Column("flagged", BigInteger, nullable=False),
    Column("flagged_vectors", BigInteger, nullable=False),
    Column("flagged_sum", LargeBinary, nullable=False),
    Column("unflagged", BigInteger, nullable=False),
    Column("unflagged_sum", LargeBinary, nullable=False),
    Column("unflagged_squares", LargeBinary, nullable=False),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("fleet", _NAME, primary_key=True),
    # Only old ones are deleted, so the largest number counts all that there ever were.
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("topic", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("head", LargeBinary, nullable=False),
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
