"""What one router has of files and batches: their stores, the thread that asks them, and who sweeps."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from serving.batches.batch_store import BatchStore
from serving.batches.file_store import FileStore
from serving.batches.line_store import LineStore
from serving.config import BatchConfig
from serving.errors import NotReadyError
from serving.tenants.database import reason_of
from serving.tenants.database_thread import DatabaseThread
from serving.tenants.days import DAY_S

logger = logging.getLogger(__name__)

SWEEP_S = 60.0      # between looks for what has expired


class BatchStores:
    def __init__(self, engine: Engine, router_id: str, config: BatchConfig) -> None:
        """`router_id` must beat in the ledger, or others take its lines."""
        self.engine = engine
        self.router_id = router_id
        self.config = config
        self.keep_s = float(config.keep_days * DAY_S)
        self.thread = DatabaseThread("batches", _not_ready)
        self.files = FileStore(engine, config.max_tenant_bytes)
        self.batches = BatchStore(engine, config.max_tenant_bytes)
        self.lines = LineStore(engine, router_id, config.max_tenant_bytes)

    def _sweep(self, now_s: float) -> int:
        return self.files.sweep(now_s) + self.batches.sweep(now_s, self.keep_s)

    async def close(self) -> None:
        """End the thread, once it has done what it was asked."""
        await asyncio.to_thread(self.thread.close)

    async def run(self) -> None:
        """Delete what has expired, in pieces, until cancelled."""
        while True:
            try:
                now_s = time.time()
                while await self.thread.call(partial(self._sweep, now_s)):
                    pass        # others had their turn
            except NotReadyError as error:
                logger.warning("files_unswept why=%s", error.message)
            await asyncio.sleep(SWEEP_S)


def _not_ready(error: SQLAlchemyError) -> NotReadyError:
    return NotReadyError(f"the database of files and batches does not answer: {reason_of(error)}", fix="try again soon")
