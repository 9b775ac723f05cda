"""The tables behind a suspicion: jobs, leases, the audit trail, trust, commands, findings told, the outbox.

They stand in the same metadata as those of :mod:`edgeguard.hub.schema`; revision 3 of the migrations makes them.
"""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, Float, Index, Integer, LargeBinary, String, Table, Text

from edgeguard.hub.schema import metadata

# SQLite counts up by itself only in a column that is exactly INTEGER.
_ID = BigInteger().with_variant(Integer, "sqlite")
_NAME, _DIGEST = String(128), String(64)

audit = Table(
    "audit",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("fleet", _NAME, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("subject", String(256), nullable=False),
    Column("who", String(256), nullable=False),
    Column("was", String(32)),
    Column("became", String(32), nullable=False),
    Column("why", Text, nullable=False),
    Index("audit_by_subject", "fleet", "subject", "id"),
    sqlite_autoincrement=True,
)
"""Only ever added to; what is older than ``[store] audit_days`` leaves."""

trust = Table(
    "trust",
    metadata,
    Column("fleet", _NAME, primary_key=True),
    Column("model_digest", _DIGEST, primary_key=True),
    Column("device", _NAME, primary_key=True),
    Column("detail", JSON, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("fleet", _NAME, nullable=False),
    Column("case_id", BigInteger, nullable=False),
    Column("model_digest", _DIGEST, nullable=False),
    Column("state", String(16), nullable=False),
    Column("owner", String(64)),
    Column("lease_until_ms", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("work", JSON, nullable=False),
    Column("progress", JSON),
    Column("result", JSON),
    Column("reason", Text, nullable=False),
    Column("output", LargeBinary),
    Column("trainable", LargeBinary),
    Column("sidecar", LargeBinary),
    Index("jobs_by_state", "fleet", "state", "id"),
    sqlite_autoincrement=True,
)

leases = Table(
    "leases",
    metadata,
    Column("fleet", _NAME, primary_key=True),
    Column("name", String(32), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("until_ms", BigInteger, nullable=False),
)

commands = Table(
    "commands",
    metadata,
    Column("fleet", _NAME, primary_key=True),
    Column("id", String(64), primary_key=True),
    Column("device", _NAME, nullable=False),
    Column("name", String(32), nullable=False),
    Column("case_id", BigInteger),
    Column("payload", LargeBinary, nullable=False),
    Column("state", String(16), nullable=False),
    Column("issued_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("sent_ms", BigInteger, nullable=False),
    Column("replied_ms", BigInteger),
    Column("reason", Text, nullable=False),
    Column("reply", LargeBinary),
    Index("commands_by_state", "fleet", "state", "issued_ms"),
)

findings = Table(
    "findings",
    metadata,
    Column("fleet", _NAME, primary_key=True),
    Column("kind", String(32), primary_key=True),
    Column("subject", String(256), primary_key=True),
    Column("told_ms", BigInteger, nullable=False),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("fleet", _NAME, nullable=False),
    Column("target", _NAME, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("next_ms", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Index("outbox_by_time", "fleet", "next_ms"),
    sqlite_autoincrement=True,
)

members = Table(
    "members",
    metadata,
    Column("fleet", _NAME, primary_key=True),
    Column("case_id", BigInteger, primary_key=True, autoincrement=False),
    Column("device", _NAME, primary_key=True),
    Column("state", String(16), nullable=False),
    Column("detail", JSON, nullable=False),
)
"""The devices that a case's release was offered to, and what became of it; revision 6 of the migrations makes it."""

shared = Table(
    "shared",
    metadata,
    Column("fleet", _NAME, primary_key=True),
    Column("case_id", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", _DIGEST, primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("who", String(256), nullable=False),
    Column("predicted", Integer),
    Column("flagged", Integer, nullable=False),
    Column("score", Float),
    Column("counts", Integer, nullable=False),
)
"""Inputs that owners shared, by the SHA-256 of their bytes: see :mod:`edgeguard.hub.shared`. Revision 7 makes it."""

tokens = Table(
    "tokens",
    metadata,
    Column("fleet", _NAME, primary_key=True),
    Column("name", _NAME, primary_key=True),
    Column("role", String(16), nullable=False),
    Column("digest", _DIGEST, nullable=False, unique=True),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger),
    Column("used_ms", BigInteger),
)
"""The API's tokens without their secrets, which are known by digest; revision 4 of the migrations makes it."""
