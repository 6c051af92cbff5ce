"""The coordinator, seen through Ray Serve."""

from __future__ import annotations

import asyncio
from typing import TypeVar, cast

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.coordinator.client import WATCH_S, CoordinatorUnavailableError
from cluster.coordinator.view import ClusterStatus, PlacementStatus, RouterReport, View
from serving.engine.expert_load import ExpertLoad
from serving.link.epoch import Epoch, Member, ShardStatus, WorkRatio

CALL_TIMEOUT_S = 10.0       # beyond what the call itself may wait
T = TypeVar("T")


class CoordinatorHandle:
    """CoordinatorApi over a Serve handle. Every call has a deadline; all that can go wrong is one error."""

    def __init__(self, handle: DeploymentHandle, call_timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._handle = handle
        self._call_timeout_s = call_timeout_s

    async def report(self, member: Member, status: ShardStatus, epoch: Epoch | None = None) -> bool:
        return cast(bool, await self._call("report", member, status, epoch))

    async def report_expert_load(self, shard_id: str, load: ExpertLoad, ratio: WorkRatio | None) -> None:
        await self._call("report_expert_load", shard_id, load, ratio)

    async def report_router(self, report: RouterReport) -> PlacementStatus | None:
        return cast("PlacementStatus | None", await self._call("report_router", report))

    async def forget_router(self, router_id: str) -> None:
        await self._call("forget_router", router_id)

    async def watch(self, seen_key: str, timeout_s: float = WATCH_S) -> View:
        return cast(View, await self._call("watch", seen_key, timeout_s, wait_s=timeout_s))

    async def status(self) -> ClusterStatus:
        return cast(ClusterStatus, await self._call("status"))

    async def _call(self, method: str, *args: object, wait_s: float = 0.0) -> object:
        try:
            async with asyncio.timeout(wait_s + self._call_timeout_s):
                return cast(object, await getattr(self._handle, method).remote(*args))
        except TimeoutError as error:
            raise CoordinatorUnavailableError(f"the coordinator did not answer {method} in time") from error
        except (RayError, RayServeException) as error:
            raise CoordinatorUnavailableError(f"the coordinator could not be asked ({method}): {error}") from error
