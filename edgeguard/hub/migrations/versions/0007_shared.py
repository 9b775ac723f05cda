"""What the hub's own copy of a model says of inputs that owners shared."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "shared",
        sa.Column("fleet", sa.String(128), primary_key=True),
        sa.Column("case_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("who", sa.String(256), nullable=False),
        sa.Column("predicted", sa.Integer),
        sa.Column("flagged", sa.Integer, nullable=False),
        sa.Column("score", sa.Float),
        sa.Column("counts", sa.Integer, nullable=False),
    )
