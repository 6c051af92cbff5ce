"""How large the part of a key's tenant is beside other tenants': that was equal before."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("keys", sa.Column("weight", sa.Integer, nullable=False, server_default="1"))
