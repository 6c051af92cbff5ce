"""One look serves all who listen, and none is taken for nobody."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack, aclosing

import pytest

from serving.errors import OverloadedError
from serving.ingress.http.ui import live_feed
from serving.ingress.http.ui.live_feed import LiveFeed
from serving.ingress.http.ui.snapshot import Snapshot
from tests.serving.ingress.http.ui.snapshots import a_snapshot


class Group:
    """Is looked at; every look finds it one token a second faster."""

    def __init__(self) -> None:
        self.num_looks = 0
        self.now_s = 0.0

    async def look(self) -> Snapshot:
        self.num_looks += 1
        return a_snapshot(num_tokens_per_s=float(self.num_looks))

    def clock(self) -> float:
        return self.now_s


async def test_parts_come_first_all_then_as_they_change() -> None:
    group = Group()
    feed = LiveFeed(group.look, group.clock, interval_s=0.0)
    async with aclosing(feed.events()) as events, asyncio.timeout(60):
        names = [(await anext(events)).split(b"\n")[0] for _ in range(4)]
        assert names == [b"event: group", b"event: holders", b"event: load", b"event: requests"]
        for number in (2, 3):
            name, content, *rest = (await anext(events)).split(b"\n")
            assert name == b"event: requests" and rest == [b"", b""]
            assert json.loads(content.removeprefix(b"data: "))["rates"]["tokens_per_s"] == number


async def test_many_share_a_look_and_nobody_costs_none() -> None:
    group = Group()
    feed = LiveFeed(group.look, group.clock, interval_s=1e6)
    async with AsyncExitStack() as stack, asyncio.timeout(60):
        for _ in range(live_feed.MAX_LISTENERS):
            events = await stack.enter_async_context(aclosing(feed.events()))
            await anext(events)
        assert (group.num_looks, feed.num_listeners) == (1, live_feed.MAX_LISTENERS)
        with pytest.raises(OverloadedError, match="close one"):
            await anext(feed.events())
    assert feed.num_listeners == 0
    async with aclosing(feed.events()) as events:
        await anext(events)
    assert group.num_looks == 2         # what was seen before is not shown to one who comes later


async def test_an_end_ends_all_who_listen() -> None:
    group = Group()
    feed = LiveFeed(group.look, group.clock, interval_s=1e6)
    async with asyncio.timeout(60):
        listening = asyncio.create_task(_count(feed))
        while not feed.num_listeners:       # noqa: ASYNC110
            await asyncio.sleep(0)
        feed.close()
        assert await listening == 4
    assert feed.num_listeners == 0


async def _count(feed: LiveFeed) -> int:
    return len([event async for event in feed.events()])
