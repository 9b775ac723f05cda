"""The first schema: names and digests stand in every row."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_NAME, _DIGEST, _BOOT = sa.String(128), sa.String(64), sa.String(16)


def upgrade() -> None:
    """Make the tables."""
    op.create_table("schema_version", sa.Column("version", sa.Integer, primary_key=True))
    op.create_table(
        "devices",
        *_identity(),
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
    )
    op.create_table(
        "streams",
        *_identity(),
        sa.Column("boot", _BOOT, primary_key=True),
        sa.Column("through_seq", sa.BigInteger, nullable=False),
        sa.Column("gaps", sa.JSON, nullable=False),
    )
    op.create_table(
        "reports",
        *_message(),
        sa.Column("inputs", sa.BigInteger, nullable=False),
        sa.Column("unchecked", sa.BigInteger, nullable=False),
        sa.Column("flagged", sa.BigInteger, nullable=False),
        sa.Column("started_ms", sa.BigInteger, nullable=False),
        sa.Column("ended_ms", sa.BigInteger, nullable=False),
        sa.Column("stored_ms", sa.BigInteger, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "alerts",
        *_message(),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("label", sa.Integer, nullable=False),
        sa.Column("score", sa.Float, nullable=False),
        sa.Column("stored_ms", sa.BigInteger, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "evidence",
        sa.Column("fleet", _NAME, primary_key=True),
        sa.Column("model_digest", _DIGEST, primary_key=True),
        sa.Column("guard_digest", _DIGEST, primary_key=True),
        sa.Column("device", _NAME, primary_key=True),
        sa.Column("label", sa.Integer, primary_key=True),
        sa.Column("inputs", sa.BigInteger, nullable=False),
        sa.Column("flagged", sa.BigInteger, nullable=False),
        sa.Column("flagged_vectors", sa.BigInteger, nullable=False),
        sa.Column("flagged_sum", sa.LargeBinary, nullable=False),
        sa.Column("unflagged", sa.BigInteger, nullable=False),
        sa.Column("unflagged_sum", sa.LargeBinary, nullable=False),
        sa.Column("unflagged_squares", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "dead_letters",
        sa.Column("fleet", _NAME, primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("head", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "cases",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("fleet", _NAME, nullable=False),
        sa.Column("model_digest", _DIGEST, nullable=False),
        sa.Column("label", sa.Integer, nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("updated_ms", sa.BigInteger, nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "events",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("fleet", _NAME, nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("subject", sa.String(256), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("events_by_fleet", "events", ["fleet", "id"])


def _identity() -> tuple[sa.Column[str], ...]:
    return (sa.Column("fleet", _NAME, primary_key=True), sa.Column("device", _NAME, primary_key=True))


def _message() -> tuple[sa.Column[str] | sa.Column[int], ...]:
    return (
        *_identity(),
        sa.Column("boot", _BOOT, primary_key=True),
        sa.Column("seq", sa.BigInteger, primary_key=True),
        sa.Column("model_digest", _DIGEST, nullable=False),
        sa.Column("guard_digest", _DIGEST, nullable=False),
    )
