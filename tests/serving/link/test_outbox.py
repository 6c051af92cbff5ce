from __future__ import annotations

import asyncio

import pytest

from serving.engine.request import TokenEvent
from serving.link.outbox import Outbox, OutboxClosedError


def outbox(window: int) -> tuple[Outbox, list[bool]]:
    holds: list[bool] = []
    return Outbox(window, holds.append), holds


async def test_one_message_per_step_while_the_router_keeps_up() -> None:
    box, holds = outbox(window=4)
    assert (await box.take()).events == ()      # the greeting
    for step in range(20):
        box.deliver([TokenEvent("a", (step,)), TokenEvent("b", (step,))])
        dispatch = await box.take()
        assert dispatch.sequence == step + 1
        assert [event.token_ids for event in dispatch.events] == [(step,), (step,)]
        box.acknowledge(dispatch.sequence)
    assert holds == []


async def test_a_silent_router_is_held_and_its_updates_coalesce() -> None:
    box, holds = outbox(window=3)
    await box.take()
    for step in range(3):
        assert holds == []
        box.deliver([TokenEvent("a", (step,))])
        await box.take()
    assert holds == [True]
    for step in range(3, 6):                    # steps that were under way
        box.deliver([TokenEvent("a", (step,))])
    waiting = asyncio.create_task(box.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    box.acknowledge(3)
    dispatch = await waiting
    assert dispatch.events == (TokenEvent("a", (3, 4, 5)),) and dispatch.sequence == 6
    assert holds == [True]                      # three steps are again unacknowledged
    box.acknowledge(6)
    assert holds == [True, False]


async def test_a_slow_write_coalesces_and_holds_too() -> None:
    box, holds = outbox(window=3)
    await box.take()
    for step in range(3):
        box.deliver([TokenEvent("a", (step,))])
    assert holds == [True]
    assert (await box.take()).events == (TokenEvent("a", (0, 1, 2)),)


async def test_acknowledging_what_was_never_sent_changes_nothing() -> None:
    box, holds = outbox(window=2)
    await box.take()
    box.deliver([TokenEvent("a")])
    box.deliver([TokenEvent("a")])
    box.acknowledge(1_000_000)
    assert holds == [True]


async def test_refresh_sends_an_empty_message() -> None:
    box, _ = outbox(window=2)
    await box.take()
    box.refresh()
    assert (await box.take()).events == ()


async def test_close_ends_a_waiting_take() -> None:
    box, _ = outbox(window=2)
    await box.take()
    waiting = asyncio.create_task(box.take())
    await asyncio.sleep(0)
    box.close("over")
    with pytest.raises(OutboxClosedError, match="over"):
        await waiting
