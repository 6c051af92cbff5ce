"""The main task of a replica: when it fails, somebody must be able to read why."""

from __future__ import annotations

import asyncio
import logging

import pytest

from cluster.background import Background


async def test_why_a_main_task_failed_is_logged_at_once_and_raised_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("no such layer")

    background = Background(asyncio.create_task(fail()))
    with caplog.at_level(logging.ERROR):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert "main_task_failed error=no such layer" in caplog.text and "in fail" in caplog.text
    with pytest.raises(ValueError, match="no such layer"):
        background.check()


async def test_a_main_task_that_is_stopped_has_not_failed(caplog: pytest.LogCaptureFixture) -> None:
    background = Background(asyncio.create_task(asyncio.sleep(60.0)))
    background.check()
    await background.stop()
    assert not caplog.records


async def test_a_main_task_that_somebody_cancelled_is_unhealthy(caplog: pytest.LogCaptureFixture) -> None:
    task: asyncio.Task[None] = asyncio.create_task(asyncio.sleep(60.0))
    background = Background(task)
    task.cancel()
    await asyncio.wait([task])
    await asyncio.sleep(0)
    assert "main_task_cancelled" in caplog.text
    with pytest.raises(RuntimeError, match="has ended"):
        background.check()


async def test_who_waits_for_an_event_hears_of_the_tasks_end_first() -> None:
    async def fail() -> None:
        raise ValueError("no such layer")

    event: asyncio.Task[None] = asyncio.create_task(asyncio.sleep(60.0))
    with pytest.raises(ValueError, match="no such layer"):
        await Background(asyncio.create_task(fail())).wait_for(event)
    with pytest.raises(asyncio.CancelledError):
        await event


async def test_an_event_that_somebody_cancelled_has_not_come() -> None:
    background, event = Background(asyncio.create_task(asyncio.sleep(60.0))), asyncio.create_task(asyncio.sleep(60.0))
    event.cancel()
    with pytest.raises(asyncio.CancelledError):
        await background.wait_for(event)
    await background.stop()
