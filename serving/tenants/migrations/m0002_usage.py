"""Requests and what they used, how much each key has used, and the routers that live."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "requests",
        sa.Column("usage_id", sa.String(32), primary_key=True),
        sa.Column("request_id", sa.String(160), nullable=False),
        sa.Column("router_id", sa.String(32), nullable=False),
        sa.Column("key_id", sa.String(12), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("day", sa.Integer, nullable=False),
        sa.Column("arrived_s", sa.Double, nullable=False),
        sa.Column("first_token_s", sa.Double),
        sa.Column("ended_s", sa.Double),
        sa.Column("num_held", sa.BigInteger, nullable=False),
        sa.Column("num_charged", sa.BigInteger, nullable=False),
        sa.Column("num_prompt", sa.BigInteger, nullable=False),
        sa.Column("num_cached", sa.BigInteger, nullable=False),
        sa.Column("num_generated", sa.BigInteger, nullable=False),
        sa.Column("num_reasoning", sa.BigInteger, nullable=False),
        sa.Column("outcome", sa.String(16)))
    op.create_index("requests_of_days", "requests", ["day", "tenant"])
    is_open = sa.text("outcome IS NULL")
    op.create_index("open_requests", "requests", ["router_id"], sqlite_where=is_open, postgresql_where=is_open)
    op.create_table(
        "standings",
        sa.Column("key_id", sa.String(12), primary_key=True),
        sa.Column("slot", sa.BigInteger, nullable=False),
        sa.Column("slot_requests", sa.JSON, nullable=False),
        sa.Column("slot_tokens", sa.JSON, nullable=False),
        sa.Column("day", sa.Integer, nullable=False),
        sa.Column("day_tokens", sa.BigInteger, nullable=False),
        sa.Column("month", sa.Integer, nullable=False),
        sa.Column("month_tokens", sa.BigInteger, nullable=False),
        sa.Column("num_open", sa.Integer, nullable=False))
    op.create_table(
        "routers",
        sa.Column("router_id", sa.String(32), primary_key=True),
        sa.Column("seen_s", sa.Double, nullable=False))
