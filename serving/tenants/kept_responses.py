"""Responses of the Responses API in the database, so that any router can follow them. The newest of each tenant stay.

Calls of the database run on a thread of their own: a long conversation must not keep the ledger waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection, Delete, Engine, delete, func, insert, select
from sqlalchemy.exc import SQLAlchemyError

from serving.errors import NotReadyError
from serving.tenants.database import reading
from serving.tenants.database_thread import DatabaseThread
from serving.tenants.days import DAY_S
from serving.tenants.schema import RESPONSES

T = TypeVar("T")
KEEP_S = 30 * DAY_S                 # as OpenAI
MAX_RESPONSES = 4096                # of one tenant
MAX_CHARACTERS = 64 * 2**20         # of all of one tenant: each has the whole conversation that it ends


class KeptResponses:
    """A response is a text, which others write and read. Methods raise NotReadyError when the database is away."""

    def __init__(self, engine: Engine, clock: Callable[[], float], max_responses: int = MAX_RESPONSES,
                 max_characters: int = MAX_CHARACTERS) -> None:
        """`clock` is Unix time."""
        self._engine = engine
        self._clock = clock
        self._max_responses = max_responses
        self._max_characters = max_characters
        self._thread = DatabaseThread("responses", _not_ready)

    async def keep(self, tenant: str, response_id: str, write: Callable[[], str]) -> None:
        """Keep what `write` returns, which another thread calls, in place of what the tenant had under this id."""
        def keep() -> None:
            text, now_s = write(), self._clock()
            with self._engine.begin() as connection:
                connection.execute(_of(tenant, response_id))
                connection.execute(insert(RESPONSES).values(
                    tenant=tenant, response_id=response_id, kept_s=now_s, num_characters=len(text), content=text))
                connection.execute(delete(RESPONSES).where(RESPONSES.c.kept_s < now_s - KEEP_S))
                self._drop_oldest(tenant, connection)
        await self._thread.call(keep)

    async def get(self, tenant: str, response_id: str, read: Callable[[str], T]) -> T | None:
        """Return what `read` makes of it, in another thread; None when there is none."""
        def get() -> T | None:
            with reading(self._engine) as connection:
                text = connection.execute(select(RESPONSES.c.content).where(
                    RESPONSES.c.tenant == tenant, RESPONSES.c.response_id == response_id,
                    RESPONSES.c.kept_s >= self._clock() - KEEP_S)).scalar_one_or_none()
            return None if text is None else read(text)
        return await self._thread.call(get)

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Forget it. Return whether there was one."""
        def forget() -> bool:
            with self._engine.begin() as connection:
                return connection.execute(_of(tenant, response_id)).rowcount > 0
        return await self._thread.call(forget)

    def close(self) -> None:
        """End the thread, when it has done what it was asked."""
        self._thread.close()

    def _drop_oldest(self, tenant: str, connection: Connection) -> None:
        num, num_characters = connection.execute(select(func.count(), func.sum(RESPONSES.c.num_characters)).where(
            RESPONSES.c.tenant == tenant)).one()
        if num <= self._max_responses and num_characters <= self._max_characters:
            return
        for response_id, size in connection.execute(select(RESPONSES.c.response_id, RESPONSES.c.num_characters).where(
                RESPONSES.c.tenant == tenant).order_by(RESPONSES.c.kept_s, RESPONSES.c.response_id)).all():
            if num <= self._max_responses and num_characters <= self._max_characters:
                return
            connection.execute(_of(tenant, response_id))
            num, num_characters = num - 1, num_characters - size


def _not_ready(error: SQLAlchemyError) -> NotReadyError:
    return NotReadyError("the database of kept responses does not answer",
                         fix="try again soon, or send the whole conversation as input")


def _of(tenant: str, response_id: str) -> Delete:
    return delete(RESPONSES).where(RESPONSES.c.tenant == tenant, RESPONSES.c.response_id == response_id)
