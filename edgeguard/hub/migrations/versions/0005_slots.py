"""Sums of feature vectors are kept apart by time. What was stored before is older than all that comes: slot 0."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_KEY = ("model_id", "device_id", "label", "slot")
_VALUES = ("width", "flagged", "unflagged", "flagged_sum", "unflagged_sum", "unflagged_squares")


def upgrade() -> None:
    """Make the table anew, as SQLite cannot change a primary key, and copy its rows."""
    op.drop_index("features_by_label", "features")
    op.rename_table("features", "old_features")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER INDEX features_pkey RENAME TO old_features_pkey")
    op.create_table(
        "features",
        *(sa.Column(name, sa.Integer, primary_key=True, autoincrement=False) for name in _KEY),
        sa.Column("width", sa.Integer, nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in _VALUES[1:3]),
        *(sa.Column(name, sa.LargeBinary, nullable=False) for name in _VALUES[3:]),
    )
    copied = ", ".join((*_KEY[:3], *_VALUES))
    op.execute(f"INSERT INTO features ({copied}, slot) SELECT {copied}, 0 FROM old_features")
    op.drop_table("old_features")
    op.create_index("features_by_label", "features", ["model_id", "label"])
