"""Lets shards and routers use the coordinator, and follow it while it restarts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from cluster.coordinator.view import NOTHING, ClusterStatus, GroupPhase, PlacementStatus, Remembered, RouterReport, View
from serving.engine.expert_load import ExpertLoad
from serving.errors import ServingError
from serving.link.epoch import Epoch, Member, ShardStatus, WorkRatio

logger = logging.getLogger(__name__)
R = TypeVar("R")
T = TypeVar("T")

WATCH_S = 10.0          # how long the coordinator may hold a question before it repeats its answer
RETRY_S = 0.2           # pause after a call that failed: the coordinator restarts


LOOK_S = 1.0            # a reporter looks so often whether it has news
REPEAT_S = 5.0          # and repeats itself after so long without: silence for three times that is death


class CoordinatorUnavailableError(ServingError):
    """The call failed or took too long. The caller goes on with what it knows and asks again."""


class CoordinatorApi(Protocol):
    """`Coordinator` itself, or a handle to it in another process. Handles raise CoordinatorUnavailableError."""

    async def report(self, member: Member, status: ShardStatus, epoch: Epoch | None = None,
                     remembered: Remembered = NOTHING) -> bool: ...
    async def forget_shard(self, shard_id: str) -> None: ...
    async def report_expert_load(self, shard_id: str, load: ExpertLoad, ratio: WorkRatio | None) -> None: ...
    async def report_router(self, report: RouterReport) -> PlacementStatus | None: ...
    async def forget_router(self, router_id: str) -> None: ...
    async def watch(self, seen_key: str, timeout_s: float) -> View: ...
    async def status(self) -> ClusterStatus: ...


class Reporter(Generic[R]):
    """Sends `report()` when it has changed, and now and then when it has not. `run` is a task of the owner."""

    def __init__(self, report: Callable[[], R], send: Callable[[R], Awaitable[object]],
                 differ: Callable[[R, R], bool]) -> None:
        self._report = report
        self._send = send
        self._differ = differ
        self._has_news = asyncio.Event()

    def notify(self) -> None:
        """Have `report()` looked at now: it has news."""
        self._has_news.set()

    async def run(self) -> None:
        sent: R | None = None
        sent_s = 0.0
        while True:
            self._has_news.clear()
            report, now_s = self._report(), time.monotonic()
            if sent is None or self._differ(report, sent) or now_s - sent_s >= REPEAT_S:
                try:
                    await self._send(report)
                    sent, sent_s = report, now_s
                except CoordinatorUnavailableError as error:
                    sent = None
                    logger.warning("report_failed error=%s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S if sent is None else LOOK_S):
                    await self._has_news.wait()


class ViewFollower:
    """Keeps the latest view. `run` is a background task of the owner; it ends only by being cancelled."""

    def __init__(self, coordinator: CoordinatorApi) -> None:
        self.view = View(GroupPhase.WAITING, None, "the coordinator has yet to answer")
        self.remembered = NOTHING       # for a coordinator that begins, and so shows nothing
        self._coordinator = coordinator
        self._changed = asyncio.Event()
        self._key = ""

    async def run(self) -> None:
        while True:
            try:
                view = await self._coordinator.watch(self._key, WATCH_S)
            except CoordinatorUnavailableError as error:
                logger.warning("coordinator_unavailable error=%s", error)
                await asyncio.sleep(RETRY_S)
                continue
            if view.key != self._key:
                self._key, self.view = view.key, view
                if view.remembered != NOTHING:
                    self.remembered = view.remembered
                self._changed.set()
                self._changed = asyncio.Event()

    async def first(self, choose: Callable[[View], T | None]) -> T:
        """Return the first that `choose` takes of a view, from now on."""
        while (chosen := choose(self.view)) is None:
            await self._changed.wait()
        return chosen

    async def until(self, accept: Callable[[View], bool]) -> View:
        """Return the first view from now on that `accept` takes."""
        return await self.first(lambda view: view if accept(view) else None)
