"""Keeps a router's key ring as the database has it."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor

from sqlalchemy.exc import SQLAlchemyError

from serving.tenants.database import reason_of
from serving.tenants.key import Key
from serving.tenants.key_ring import KeyRing
from serving.tenants.key_store import KeyStore

logger = logging.getLogger(__name__)

POLL_S = 1.0        # a change counts on all routers within 5 s


class KeyFollower:
    """While the database does not answer, the keys that were read last go on to count."""

    def __init__(self, store: KeyStore, ring: KeyRing, thread: Executor) -> None:
        self._store = store
        self._ring = ring
        self._thread = thread
        self._num_changes: int | None = None        # that the ring has
        self._is_silent = False                     # the database, and that was logged

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            await self.follow()
            await asyncio.sleep(POLL_S)

    async def follow(self) -> None:
        """Bring the ring up to date once."""
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, self._read)
        except SQLAlchemyError as error:
            if not self._is_silent:
                logger.warning("keys_unread why=%s", reason_of(error))
            self._is_silent = True
            return
        self._is_silent = False
        if found is not None:
            self._num_changes, keys = found
            self._ring.set_keys(keys)
            logger.info("keys_read num=%d change=%d", len(keys), self._num_changes)

    def _read(self) -> tuple[int, list[Key]] | None:
        """Return the keys, and the number of the change that they are of at least; None where nothing has changed."""
        num_changes = self._store.num_changes()
        return None if num_changes == self._num_changes else (num_changes, self._store.all())
