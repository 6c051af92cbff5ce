"""The main task of a replica."""

from __future__ import annotations

import asyncio
import contextlib
import logging

logger = logging.getLogger(__name__)


class Background:
    """A task that must not end. Serve's health check asks; the constructor may wait for a first success."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task
        task.add_done_callback(_log_failure)

    async def wait_for(self, event: asyncio.Task[None]) -> None:
        """Until `event` is done. Raises what ended the task when that comes first."""
        await asyncio.wait((self._task, event), return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            event.cancel()
            self._task.result()

    def check(self) -> None:
        if self._task.done():
            self._task.result()
            raise RuntimeError("the replica's main task has ended")

    async def stop(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self._task


def _log_failure(task: asyncio.Task[None]) -> None:
    """At once: Serve asks later, and may have stopped the replica by then."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        logger.error("main_task_failed error=%s", error, exc_info=error)
