"""Adds requests that are old up by day and key, and forgets them one by one: bills stay, and the database stays small.

Several routers may do so at a time: a row belongs to the transaction that has locked it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Executor

from sqlalchemy import Engine, RowMapping, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from serving.tenants.database import reason_of
from serving.tenants.days import day_of
from serving.tenants.schema import REQUESTS, USAGE_DAYS

logger = logging.getLogger(__name__)

EVERY_S = 3600.0
_AT_A_TIME = 500        # rows of one transaction: requests that begin wait for it
_COUNTS = ("num_prompt", "num_cached", "num_generated", "num_reasoning")
_Sums = dict[tuple[int, str, str], dict[str, int]]      # by day, key and tenant


class UsageArchive:
    def __init__(self, engine: Engine, thread: Executor, clock: Callable[[], float], keep_days: int) -> None:
        """`clock` is Unix time."""
        self._engine = engine
        self._thread = thread
        self._clock = clock
        self._keep_days = keep_days

    async def run(self) -> None:
        """Archive what is old, once an hour, until cancelled."""
        while True:
            await self.archive()
            await asyncio.sleep(EVERY_S)

    async def archive(self) -> None:
        """Archive all that is old now."""
        first_kept_day, num = day_of(self._clock()) - self._keep_days, 0
        try:
            while some := await asyncio.get_running_loop().run_in_executor(self._thread, self._some, first_kept_day):
                num += some
        except SQLAlchemyError as error:
            logger.warning("usage_unarchived why=%s", reason_of(error))
        if num:
            logger.info("usage_archived num_requests=%d", num)

    def _some(self, first_kept_day: int) -> int:
        """Archive some requests of the days before. Return how many they were."""
        insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        with self._engine.begin() as connection:
            rows = connection.execute(select(REQUESTS).where(
                REQUESTS.c.day < first_kept_day, REQUESTS.c.outcome.is_not(None)).limit(_AT_A_TIME)
                .with_for_update()).mappings().all()
            for (day, key_id, tenant), counts in sorted(_sums(rows).items()):
                new = insert(USAGE_DAYS).values(day=day, key_id=key_id, tenant=tenant, **counts)
                connection.execute(new.on_conflict_do_update(
                    index_elements=["day", "key_id", "tenant"],
                    set_={name: USAGE_DAYS.c[name] + new.excluded[name] for name in counts}))
            connection.execute(delete(REQUESTS).where(REQUESTS.c.usage_id.in_([row["usage_id"] for row in rows])))
        return len(rows)


def _sums(rows: Iterable[RowMapping]) -> _Sums:
    sums: _Sums = {}
    for row in rows:
        counts = sums.setdefault((row["day"], row["key_id"], row["tenant"]),
                                 dict.fromkeys(("num_requests", *_COUNTS), 0))
        counts["num_requests"] += 1
        for name in _COUNTS:
            counts[name] += row[name]
    return sums
