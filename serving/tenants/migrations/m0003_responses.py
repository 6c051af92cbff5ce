"""Responses of the Responses API."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "responses",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("response_id", sa.String(160), primary_key=True),
        sa.Column("kept_s", sa.Double, nullable=False),
        sa.Column("num_characters", sa.BigInteger, nullable=False),
        sa.Column("content", sa.Text, nullable=False))
    op.create_index("responses_by_age", "responses", ["kept_s"])
