"""The main task of a replica."""

from __future__ import annotations

import asyncio
import contextlib
import logging

logger = logging.getLogger(__name__)


class Background:
    """Owns a task that must not end. Serve's health check asks; the constructor may wait for a first success."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task
        self._is_stopping = False
        task.add_done_callback(self._log_end)

    async def wait_for(self, event: asyncio.Task[None]) -> None:
        """Wait until `event` is done, and raise what ended it or, when that comes first, the task."""
        try:
            await asyncio.wait((self._task, event), return_when=asyncio.FIRST_COMPLETED)
        finally:
            event.cancel()
        self.check()
        event.result()

    def check(self) -> None:
        """Raise what ended the task; RuntimeError when it returned or was cancelled."""
        if self._task.done():
            if not self._task.cancelled():
                self._task.result()
            raise RuntimeError("the replica's main task has ended")

    async def stop(self) -> None:
        self._is_stopping = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self._task

    def _log_end(self, task: asyncio.Task[None]) -> None:
        """Log it at once: Serve asks later, and may have stopped the replica by then."""
        if task.cancelled():
            if not self._is_stopping:
                logger.error("main_task_cancelled")
        elif (error := task.exception()) is not None:
            logger.error("main_task_failed error=%s", error, exc_info=error)
