"""What stands behind a suspicion: jobs, leases, the audit trail, trust, commands, findings told, the outbox."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_NAME, _DIGEST = sa.String(128), sa.String(64)


def upgrade() -> None:
    """Make the tables; cases from before them keep what was decided."""
    op.create_table(
        "audit",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("fleet", _NAME, nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("subject", sa.String(256), nullable=False),
        sa.Column("who", sa.String(256), nullable=False),
        sa.Column("was", sa.String(32)),
        sa.Column("became", sa.String(32), nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("audit_by_subject", "audit", ["fleet", "subject", "id"])
    op.create_table(
        "trust",
        sa.Column("fleet", _NAME, primary_key=True),
        sa.Column("model_digest", _DIGEST, primary_key=True),
        sa.Column("device", _NAME, primary_key=True),
        sa.Column("detail", sa.JSON, nullable=False),
    )
    op.create_table(
        "jobs",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("fleet", _NAME, nullable=False),
        sa.Column("case_id", sa.BigInteger, nullable=False),
        sa.Column("model_digest", _DIGEST, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("owner", sa.String(64)),
        sa.Column("lease_until_ms", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("work", sa.JSON, nullable=False),
        sa.Column("progress", sa.JSON),
        sa.Column("result", sa.JSON),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("output", sa.LargeBinary),
        sa.Column("trainable", sa.LargeBinary),
        sqlite_autoincrement=True,
    )
    op.create_index("jobs_by_state", "jobs", ["fleet", "state", "id"])
    op.create_table(
        "leases",
        sa.Column("fleet", _NAME, primary_key=True),
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("until_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "commands",
        sa.Column("fleet", _NAME, primary_key=True),
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("device", _NAME, nullable=False),
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("case_id", sa.BigInteger),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("issued_ms", sa.BigInteger, nullable=False),
        sa.Column("expires_ms", sa.BigInteger, nullable=False),
        sa.Column("sent_ms", sa.BigInteger, nullable=False),
        sa.Column("replied_ms", sa.BigInteger),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("reply", sa.LargeBinary),
    )
    op.create_index("commands_by_state", "commands", ["fleet", "state", "issued_ms"])
    op.create_table(
        "findings",
        sa.Column("fleet", _NAME, primary_key=True),
        sa.Column("kind", sa.String(32), primary_key=True),
        sa.Column("subject", sa.String(256), primary_key=True),
        sa.Column("told_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "outbox",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("fleet", _NAME, nullable=False),
        sa.Column("target", _NAME, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("next_ms", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("outbox_by_time", "outbox", ["fleet", "next_ms"])
    _translate()


def _translate() -> None:
    """What was under way begins anew, as a suspicion: there is no job for it. What was released is a case."""
    cases = sa.table("cases", sa.column("id", _ID), sa.column("state", sa.String), sa.column("detail", sa.JSON))
    db = op.get_bind()
    for number, state, detail in db.execute(sa.select(cases.c.id, cases.c.state, cases.c.detail)).all():
        became = "suspected" if state in ("confirming", "repairing", "repaired") else state
        verdict = (detail.get("result") or {}).get("verdict")
        is_case = became != "suspected" and verdict == "confirmed"
        values = {"state": became, "detail": {**detail, "state": became, "is_case": is_case}}
        db.execute(sa.update(cases).where(cases.c.id == number).values(**values))
