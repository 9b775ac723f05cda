"""A repaired model brings its sidecar."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Make room for it beside the model."""
    op.add_column("jobs", sa.Column("sidecar", sa.LargeBinary))
