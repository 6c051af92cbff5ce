"""Whoever owns a task is told of its end, whatever ended it."""

from __future__ import annotations

import asyncio

import pytest

from serving.supervision import TaskEndedError, first_end, owned_tasks, run_endless


async def forever() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise ValueError("no such layer")


async def cancel_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def raise_a_cancellation() -> None:
    """Do as reading from a call of gRPC that was cancelled elsewhere does."""
    raise asyncio.CancelledError


async def test_an_error_ends_the_others_and_is_raised() -> None:
    with pytest.raises(ValueError, match="no such layer"):
        await run_endless(other=forever(), broken=fail())
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("work", [cancel_itself, raise_a_cancellation])
async def test_a_cancelled_task_is_seen(work: type) -> None:
    """asyncio.TaskGroup goes on as if nothing had happened."""
    with pytest.raises(TaskEndedError, match="the task epochs was cancelled"):
        await run_endless(other=forever(), epochs=work())
    assert len(asyncio.all_tasks()) == 1


async def test_a_task_that_returns_is_seen() -> None:
    with pytest.raises(TaskEndedError, match="the task short returned"):
        await run_endless(other=forever(), short=asyncio.sleep(0))


async def test_its_owners_cancellation_is_passed_on() -> None:
    task = asyncio.create_task(run_endless(one=forever(), two=forever()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(asyncio.all_tasks()) == 1


async def test_the_first_that_returned_is_named_and_the_others_still_run() -> None:
    async with owned_tasks(long=forever(), short=asyncio.sleep(0)) as tasks:
        assert await first_end(tasks.values()) is tasks["short"]
        assert not tasks["long"].done()
    assert tasks["long"].cancelled()
