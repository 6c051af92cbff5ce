"""SIGTERM to the process of a replica. Ray's own handler has the worker take no more calls and lets its threads run on:
a shard would neither leave its group nor end, until Serve gives up asking it and kills it."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
from collections.abc import Coroutine

from serving.supervision import first_end, owned_tasks

logger = logging.getLogger(__name__)


async def until_told_to_end(main: Coroutine[None, None, None]) -> None:
    """Run `main` until it returns or this process is sent SIGTERM, which cancels it, and end the process.

    Serve finds the process gone and starts another, if it is to keep as many. Raises what `main` raises.
    """
    async with owned_tasks(order=_order_to_end(), main=main) as tasks:
        await first_end(tasks.values())
    os._exit(0)     # what Ray's worker still waits for would keep it


async def _order_to_end() -> None:
    """Return when this process is sent SIGTERM.

    Code of a replica runs beside the main thread, where neither signal.signal nor the loop takes handlers. That of
    faulthandler may be set from any thread; that it writes something is all that is needed of it.
    """
    loop, is_told = asyncio.get_running_loop(), asyncio.Event()
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    loop.add_reader(read_fd, is_told.set)
    faulthandler.register(signal.SIGTERM, write_fd, all_threads=False, chain=False)
    await is_told.wait()
    loop.remove_reader(read_fd)         # the handler stays: Ray's would be in the way of what is done now
    logger.info("told_to_end pid=%d", os.getpid())
