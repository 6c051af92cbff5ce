"""What one router has of the tenants' database: keys, the meter, and responses that are kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor

from serving.supervision import owned_tasks, run_endless
from serving.tenants.database import open_database
from serving.tenants.kept_responses import KeptResponses
from serving.tenants.key_follower import KeyFollower
from serving.tenants.key_ring import KeyRing
from serving.tenants.key_store import KeyStore
from serving.tenants.ledger import Ledger
from serving.tenants.meter import Meter
from serving.tenants.usage_archive import UsageArchive
from serving.tenants.usage_reader import UsageReader


class Access:
    def __init__(self, url: str, router_id: str, keep_days: int) -> None:
        """Open the database and bring its schema up to date: takes a moment. Requests stand in it one by one for
        `keep_days`. Raises DatabaseError."""
        self.engine = open_database(url)
        self._thread = ThreadPoolExecutor(1, "tenants")
        self.keys = KeyRing(time.time)
        self.meter = Meter(Ledger(self.engine, router_id), self._thread, time.time)
        self._archive = UsageArchive(self.engine, self._thread, time.time, keep_days)
        self.responses = KeptResponses(self.engine, time.time)
        self.usage = UsageReader(self.engine)
        self._follower = KeyFollower(KeyStore(self.engine), self.keys, self._thread)

    async def run(self) -> None:
        """Follow the database, and write what is used, until cancelled."""
        await run_endless(keys=self._follower.run(), meter=self.meter.run(), archive=self._archive.run())

    async def close_after(self, work: Coroutine[None, None, None]) -> None:
        """Run on until `work` is done, then write the last ends, and end the thread."""
        async with owned_tasks(access=self.run()):
            await work
        await self.meter.write()
        await asyncio.to_thread(self._thread.shutdown)
        await asyncio.to_thread(self.responses.close)
        await asyncio.to_thread(self.usage.close)
        self.engine.dispose()
