"""Observes shards and routers, decides epochs (by cluster/membership.py), tells everybody. No Ray in here.

All its state is soft. A shard that reports an epoch which the coordinator does not know is asked to send it, so after a
restart the coordinator goes on with the epoch that runs, and numbers the next one above every number it has seen.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.membership import UNKNOWN, GroupRules, GroupSnapshot, Report, View, decide, is_of_unknown_epoch
from serving.epoch import Epoch, Member, ShardStatus
from serving.expert_load import ExpertLoad

logger = logging.getLogger(__name__)

FORGET_AFTER_S = 60.0       # reports of members and routers that are gone


@dataclass(frozen=True, slots=True)
class RouterReport:
    """What a router replica says of itself. `epoch`: the number that it serves, 0 for none."""

    router_id: str
    node_name: str
    grpc_address: str           # host:port of its own gRPC door
    epoch: int
    is_ready: bool


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """Everything the coordinator knows, for `moesaic status`."""

    view: View
    shards: tuple[tuple[Member, ShardStatus], ...]
    routers: tuple[RouterReport, ...]

    @property
    def is_ready(self) -> bool:
        """The group is ready, and every router serves its epoch."""
        epoch = self.view.epoch
        return (self.view.phase == "ready" and epoch is not None and bool(self.routers)
                and all(router.is_ready and router.epoch == epoch.number for router in self.routers))


class Coordinator:
    """One event loop calls everything."""

    def __init__(self, rules: GroupRules, clock: Callable[[], float]) -> None:
        self._rules = rules
        self._clock = clock
        self._reports: dict[str, Report] = {}
        self._routers: dict[str, tuple[RouterReport, float]] = {}
        self._loads: dict[str, ExpertLoad] = {}     # the latest of each shard
        self._highest_epoch = 0
        self._known_epoch = 0
        self._view = decide(GroupSnapshot((), None, 0, 0, clock()), rules)
        self._changed = asyncio.Event()

    async def report(self, member: Member, status: ShardStatus, epoch: Epoch | None = None) -> bool:
        """Register a shard, or hear that it lives. True: it is in an epoch unknown here and should send that along."""
        self._reports[member.shard_id] = Report(member, status, self._clock())
        self._highest_epoch = max(self._highest_epoch, status.epoch)
        if epoch is not None and epoch.number > self._known_epoch:
            self._adopt(epoch)
        self._refresh()
        return is_of_unknown_epoch(self._reports[member.shard_id], self._known_epoch)

    async def report_router(self, report: RouterReport) -> None:
        self._routers[report.router_id] = (report, self._clock())
        self._highest_epoch = max(self._highest_epoch, report.epoch)
        self._refresh()

    async def forget_router(self, router_id: str) -> None:
        """A router that stops says so; one that dies is forgotten after a while."""
        self._routers.pop(router_id, None)

    async def report_expert_load(self, shard_id: str, load: ExpertLoad) -> None:
        self._loads[shard_id] = load

    async def watch(self, seen_key: str, timeout_s: float) -> View:
        """The view, as soon as it is another than the caller has seen; the same one after timeout_s."""
        self._refresh()
        if self._view.key == seen_key:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                self._refresh()
        return self._view

    async def status(self) -> ClusterStatus:
        self._refresh()
        reports = [self._reports[shard_id] for shard_id in sorted(self._reports)]
        routers = [self._routers[router_id][0] for router_id in sorted(self._routers)]
        return ClusterStatus(self._view, tuple((report.member, report.status) for report in reports), tuple(routers))

    def _adopt(self, epoch: Epoch) -> None:
        """Go on with an epoch that another coordinator made. Its members have yet to report here."""
        logger.info("epoch_adopted number=%d members=%d", epoch.number, len(epoch.members))
        now_s = self._clock()
        self._know(epoch)
        for member in epoch.members:
            unheard = ShardStatus(member.shard_id, epoch.number, UNKNOWN)
            self._reports.setdefault(member.shard_id, Report(member, unheard, now_s))
        self._view = replace(self._view, epoch=epoch)

    def _refresh(self) -> None:
        """Decide again, and wake everybody who watches when something has changed."""
        now_s = self._clock()
        self._reports = {shard_id: report for shard_id, report in self._reports.items()
                         if now_s - report.at_s <= FORGET_AFTER_S}
        self._loads = {shard_id: load for shard_id, load in self._loads.items() if shard_id in self._reports}
        self._routers = {router_id: (report, at_s) for router_id, (report, at_s) in self._routers.items()
                         if now_s - at_s <= self._rules.lost_after_s}
        view = decide(self._snapshot(), self._rules)
        if view.epoch is not None:
            self._know(view.epoch)
        if view.key == self._view.key:
            return
        number = view.epoch.number if view.epoch else 0
        logger.info("view_changed epoch=%d phase=%s why=%s", number, view.phase, view.why)
        self._view = view
        self._changed.set()
        self._changed = asyncio.Event()

    def _snapshot(self) -> GroupSnapshot:
        return GroupSnapshot(tuple(self._reports.values()), self._view.epoch, self._highest_epoch, self._known_epoch,
                             self._clock())

    def _know(self, epoch: Epoch) -> None:
        self._known_epoch = max(self._known_epoch, epoch.number)
        self._highest_epoch = max(self._highest_epoch, epoch.number)
