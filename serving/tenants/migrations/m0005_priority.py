"""A key's priority is the most urgent, which is the lowest, that a request may ask for: it was 0 to 9, the highest
first, and 5 unless said otherwise."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.execute("UPDATE keys SET priority = 5 - priority")
