"""Batches of requests, and their lines."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "batches",
        sa.Column("batch_id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(12)),
        sa.Column("endpoint", sa.String(32), nullable=False),
        sa.Column("input_file_id", sa.String(32), nullable=False),
        sa.Column("output_file_id", sa.String(32), nullable=False),
        sa.Column("error_file_id", sa.String(32), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("labels", sa.JSON, nullable=False),
        sa.Column("times_s", sa.JSON, nullable=False),
        sa.Column("errors", sa.JSON, nullable=False),
        sa.Column("model", sa.String(256)),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("expires_s", sa.Double, nullable=False),
        sa.Column("num_total", sa.Integer, nullable=False),
        sa.Column("num_completed", sa.Integer, nullable=False),
        sa.Column("num_failed", sa.Integer, nullable=False),
        sa.Column("num_prompt", sa.BigInteger, nullable=False),
        sa.Column("num_cached", sa.BigInteger, nullable=False),
        sa.Column("num_generated", sa.BigInteger, nullable=False),
        sa.Column("num_reasoning", sa.BigInteger, nullable=False),
        sa.Column("router_id", sa.String(32)),
        sa.Column("taken_s", sa.Double, nullable=False),
        sa.Column("retry_s", sa.Double, nullable=False))
    op.create_index("batches_of_tenants", "batches", ["tenant", "created_s"])
    op.create_table(
        "batch_lines",
        sa.Column("batch_id", sa.String(32), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("custom_id", sa.String(512), nullable=False),
        sa.Column("first_byte", sa.BigInteger, nullable=False),
        sa.Column("num_bytes", sa.Integer, nullable=False),
        sa.Column("router_id", sa.String(32)),
        sa.Column("num_tries", sa.Integer, nullable=False),
        sa.Column("outcome", sa.String(16)))
    is_open = sa.text("outcome IS NULL")
    op.create_index("open_lines", "batch_lines", ["batch_id", "number"], sqlite_where=is_open,
                    postgresql_where=is_open)
