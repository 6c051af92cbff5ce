"""Tasks that somebody owns: whatever ends one, an error, a return or a cancellation, its owner is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Coroutine
from contextlib import asynccontextmanager

from serving.errors import ServingError


class TaskEndedError(ServingError):
    """A task that must not end has returned, or was cancelled by somebody other than its owner."""


@asynccontextmanager
async def owned_tasks(**works: Coroutine[None, None, object]) -> AsyncIterator[dict[str, asyncio.Task[object]]]:
    """Run the works until the block is left, then cancel what still runs and wait for it.

    Unlike asyncio.TaskGroup it does not end the block by itself: wait for first_end(), which also sees a cancellation.
    """
    tasks = {name: asyncio.create_task(work, name=name) for name, work in works.items()}
    try:
        yield tasks
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)      # first_end() has raised what matters


async def first_end(tasks: Collection[asyncio.Task[object]]) -> asyncio.Task[object]:
    """Wait until one of the tasks ends, and return the first that returned.

    Raises what a task raised, before that of a later one; TaskEndedError for one that was cancelled.
    """
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    ended = [task for task in tasks if task in done]
    for task in ended:
        if task.cancelled():
            raise TaskEndedError(f"the task {task.get_name()} was cancelled", fix="see the log for what ended it")
        task.result()
    return ended[0]


async def run_endless(**works: Coroutine[None, None, object]) -> None:
    """Run works of which none may end, until this is cancelled or one does.

    Raises what it raised, TaskEndedError when it returned or was cancelled; the others are cancelled first.
    """
    async with owned_tasks(**works) as tasks:
        ended = await first_end(tasks.values())
    raise TaskEndedError(f"the task {ended.get_name()} returned", fix="see the log for why")
