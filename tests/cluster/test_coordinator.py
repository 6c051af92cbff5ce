"""The coordinator as its members see it, restarts included."""

from __future__ import annotations

import asyncio

import pytest

from cluster.coordinator import Coordinator, RouterReport
from cluster.membership import GroupPhase, ShardState
from serving.epoch import Epoch
from tests.cluster.group_reports import member, rules, status_of

A, B, C = (member(name) for name in "abc")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def coordinator(clock: Clock) -> Coordinator:
    return Coordinator(rules(), clock)


async def bring_to_ready(coordinator: Coordinator) -> Epoch:
    for one in (A, B, C):
        await coordinator.report(one, status_of(one))
    for state in (ShardState.LOADED, ShardState.READY):
        for one in (A, B, C):
            await coordinator.report(one, status_of(one, state, epoch=1))
    view = await coordinator.watch("", 0.0)
    assert view.phase is GroupPhase.READY and view.epoch is not None
    return view.epoch


async def test_everybody_who_watches_hears_of_a_change_at_once(coordinator: Coordinator) -> None:
    seen = (await coordinator.watch("", 0.0)).key
    watchers = [asyncio.create_task(coordinator.watch(seen, 60.0)) for _ in range(3)]
    await asyncio.sleep(0)
    await coordinator.report(A, status_of(A))
    views = await asyncio.gather(*watchers)
    assert all("1 of 3" in view.why for view in views)


async def test_a_watch_without_news_ends_in_time(coordinator: Coordinator) -> None:
    view = await coordinator.watch("", 0.0)
    assert await coordinator.watch(view.key, 0.001) == view


async def test_healthy_only_when_group_and_routers_serve_the_same_epoch(coordinator: Coordinator) -> None:
    await bring_to_ready(coordinator)
    assert not (await coordinator.status()).is_ready
    await coordinator.report_router(RouterReport("r", "node-a", "a:9", epoch=0, is_ready=False))
    assert not (await coordinator.status()).is_ready
    await coordinator.report_router(RouterReport("r", "node-a", "a:9", epoch=1, is_ready=True))
    assert (await coordinator.status()).is_ready


async def test_a_restart_goes_on_with_the_running_epoch(coordinator: Coordinator, clock: Clock) -> None:
    epoch = await bring_to_ready(coordinator)
    again = Coordinator(rules(), clock)
    ready = {one.shard_id: status_of(one, ShardState.READY, epoch=1) for one in (A, B, C)}
    for one in (A, B, C):
        assert await again.report(one, ready[one.shard_id])             # it asks for the epoch it does not know
    again = Coordinator(rules(), clock)
    assert await again.report(B, ready[B.shard_id])
    assert not await again.report(B, ready[B.shard_id], epoch)
    assert (await again.watch("", 0.0)).epoch == epoch                  # though A and C have yet to report
    for one in (A, C):
        assert not await again.report(one, ready[one.shard_id])
    view = await again.watch("", 0.0)
    assert (view.phase, view.epoch) == (GroupPhase.READY, epoch)


async def test_after_a_restart_numbers_go_on(coordinator: Coordinator, clock: Clock) -> None:
    epoch = await bring_to_ready(coordinator)
    again = Coordinator(rules(), clock)
    await again.report(A, status_of(A, ShardState.READY, epoch=1), epoch)
    clock.now_s += 11.0                                                 # B and C died with the old coordinator
    new_b, new_c = member("b2"), member("c2")
    for one in (new_b, new_c):
        await again.report(one, status_of(one))
    await again.report(A, status_of(A, ShardState.WAITING, epoch=1))
    found = (await again.watch("", 0.0)).epoch
    assert found is not None and (found.number, found.members) == (2, (A, new_b, new_c))


async def test_silent_members_and_routers_are_forgotten(coordinator: Coordinator, clock: Clock) -> None:
    await bring_to_ready(coordinator)
    await coordinator.report_router(RouterReport("r", "node-a", "a:9", epoch=1, is_ready=True))
    clock.now_s += 11.0
    status = await coordinator.status()
    assert not status.routers and "is gone" in status.view.why and "0 of 3" in status.view.why
    clock.now_s += 60.0
    assert not (await coordinator.status()).shards
