"""The devices of a roll-out, and how each device fares."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Make the table and the column."""
    op.create_table(
        "members",
        sa.Column("fleet", sa.String(128), primary_key=True),
        sa.Column("case_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("device", sa.String(128), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
    )
    op.add_column("devices", sa.Column("pulse", sa.LargeBinary))
