"""What was used on days whose requests are not kept one by one any more."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "usage_days",
        sa.Column("day", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("key_id", sa.String(12), primary_key=True),
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("num_requests", sa.BigInteger, nullable=False),
        sa.Column("num_prompt", sa.BigInteger, nullable=False),
        sa.Column("num_cached", sa.BigInteger, nullable=False),
        sa.Column("num_generated", sa.BigInteger, nullable=False),
        sa.Column("num_reasoning", sa.BigInteger, nullable=False))
