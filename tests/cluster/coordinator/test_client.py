"""Following a coordinator that comes and goes."""

from __future__ import annotations

import asyncio
import operator

import pytest

from cluster.coordinator import client as coordinator_client
from cluster.coordinator.client import CoordinatorUnavailableError, Reporter, ViewFollower
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.view import NOTHING, ClusterStatus, GroupPhase, Remembered, RouterReport, View
from serving.engine.expert_load import ExpertLoad
from serving.link.epoch import Epoch, Member, ShardStatus, WorkRatio
from tests.cluster.coordinator.group_reports import member, rules, status_of
from tests.deadlines import PATIENCE_S


class Flaky:
    """A coordinator of which every second call fails."""

    def __init__(self, real: Coordinator) -> None:
        self.real = real
        self._num_calls = 0

    def _fail_now_and_then(self) -> None:
        self._num_calls += 1
        if self._num_calls % 2:
            raise CoordinatorUnavailableError("it restarts")

    async def report(self, one: Member, status: ShardStatus, epoch: Epoch | None = None,
                     remembered: Remembered = NOTHING) -> bool:
        self._fail_now_and_then()
        return await self.real.report(one, status, epoch, remembered)

    async def report_router(self, report: RouterReport) -> None:
        await self.real.report_router(report)

    async def forget_router(self, router_id: str) -> None:
        await self.real.forget_router(router_id)

    async def report_expert_load(self, shard_id: str, load: ExpertLoad, ratio: WorkRatio | None) -> None:
        await self.real.report_expert_load(shard_id, load, ratio)

    async def watch(self, seen_key: str, timeout_s: float) -> View:
        self._fail_now_and_then()
        return await self.real.watch(seen_key, timeout_s)

    async def status(self) -> ClusterStatus:
        return await self.real.status()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_client, "RETRY_S", 0.0)


@pytest.fixture
def coordinator() -> Flaky:
    return Flaky(Coordinator(rules(), lambda: 0.0))


async def test_a_follower_gets_every_view_it_waits_for(coordinator: Flaky) -> None:
    follower = ViewFollower(coordinator)
    running = asyncio.create_task(follower.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await follower.until(lambda view: "0 of 3" in view.why)
            for name in "abc":
                await coordinator.real.report(member(name), status_of(member(name)))
            view = await follower.until(lambda view: view.phase is GroupPhase.LOADING)
        assert view.epoch is not None and view.epoch.number == 1
    finally:
        running.cancel()


async def test_what_a_coordinator_remembered_is_kept_until_the_next_one_knows(coordinator: Flaky) -> None:
    first, later = Remembered(sizes=(("cpu", 2),)), Remembered(sizes=(("cpu", 3),))
    shown = [View(GroupPhase.READY, None, "of the old one", remembered=first)]

    async def watch(seen_key: str, timeout_s: float) -> View:
        await asyncio.sleep(0)
        return shown[-1]
    coordinator.watch = watch       # type: ignore[method-assign]
    follower = ViewFollower(coordinator)
    running = asyncio.create_task(follower.run())
    try:
        async with asyncio.timeout(10.0):
            await follower.until(lambda view: view.why == "of the old one")
            for why, remembered, expected in (("new", NOTHING, first), ("it knows", later, later)):
                shown.append(View(GroupPhase.WAITING, None, why, remembered=remembered))
                await follower.until(lambda view, why=why: view.why == why)     # type: ignore[misc]
                assert follower.remembered == expected
    finally:
        running.cancel()


async def test_a_reporter_sends_news_at_once_and_again_after_a_failure(coordinator: Flaky) -> None:
    one, statuses = member("a"), [status_of(member("a"))]
    sent: asyncio.Queue[ShardStatus] = asyncio.Queue()

    async def send(status: ShardStatus) -> None:
        await coordinator.report(one, status)
        sent.put_nowait(status)
    reporter = Reporter(lambda: statuses[-1], send, operator.ne)
    running = asyncio.create_task(reporter.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert await sent.get() == statuses[0]
            statuses.append(status_of(one, epoch_number=5))
            reporter.notify()
            assert await sent.get() == statuses[1]
        assert sent.empty()
    finally:
        running.cancel()
