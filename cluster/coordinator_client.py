"""What shards and routers use of the coordinator, and how they follow it while it restarts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from cluster.coordinator import ClusterStatus, RouterReport
from cluster.membership import GroupPhase, View
from serving.epoch import Epoch, Member, ShardStatus
from serving.errors import ServingError

logger = logging.getLogger(__name__)

WATCH_S = 5.0           # how long the coordinator may hold a question before it repeats its answer
RETRY_S = 0.2           # pause after a call that failed: the coordinator restarts


class CoordinatorUnavailableError(ServingError):
    """The call failed or took too long. The caller goes on with what it knows and asks again."""


class CoordinatorApi(Protocol):
    """`Coordinator` itself, or a handle to it in another process. Handles raise CoordinatorUnavailableError."""

    async def report(self, member: Member, status: ShardStatus, epoch: Epoch | None = None) -> bool: ...
    async def report_router(self, report: RouterReport) -> None: ...
    async def forget_router(self, router_id: str) -> None: ...
    async def watch(self, seen_key: str, timeout_s: float) -> View: ...
    async def status(self) -> ClusterStatus: ...


class ViewFollower:
    """Keeps the latest view. `run` is a background task of the owner; it ends only by being cancelled."""

    def __init__(self, coordinator: CoordinatorApi) -> None:
        self.view = View(GroupPhase.WAITING, None, "the coordinator has yet to answer")
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
                self._changed.set()
                self._changed = asyncio.Event()

    async def until(self, accept: Callable[[View], bool]) -> View:
        """The first view from now on that `accept` takes."""
        while not accept(self.view):
            await self._changed.wait()
        return self.view
