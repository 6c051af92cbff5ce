"""Reads usage for a door, on a thread of its own: what months have used takes seconds to add up."""

from __future__ import annotations

from functools import partial

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from serving.errors import NotReadyError, OverloadedError
from serving.tenants.database import reason_of
from serving.tenants.database_thread import DatabaseThread
from serving.tenants.usage import Usage, read_usage
from serving.tenants.usage_by import UsageBy

MAX_PENDING = 4         # reports, each of seconds
RETRY_AFTER_S = 5.0


class UsageReader:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = DatabaseThread("usage", _not_ready)
        self._num_pending = 0

    async def read(self, by: UsageBy, days: tuple[int, int], tenant: str | None) -> list[Usage]:
        """Return what read_usage() does. Raises NotReadyError when the database does not answer, OverloadedError when
        as many ask already as may."""
        if self._num_pending >= MAX_PENDING:
            raise OverloadedError(f"{self._num_pending} reports of usage are being made already",
                                  retry_after_s=RETRY_AFTER_S, fix=f"try again in {RETRY_AFTER_S:.0f} s")
        self._num_pending += 1
        try:
            return await self._thread.call(partial(read_usage, self._engine, by, days, tenant))
        finally:
            self._num_pending -= 1

    def close(self) -> None:
        self._thread.close()


def _not_ready(error: SQLAlchemyError) -> NotReadyError:
    return NotReadyError(f"the database of usage does not answer: {reason_of(error)}",
                         fix="try again soon, or ask for fewer days")
