"""Observes shards and routers, decides epochs (by cluster/coordinator/membership.py), tells everybody. No Ray in here.

All its state is soft. A shard that reports an epoch or a revision which the coordinator does not know is asked to send
it, so after a restart the coordinator goes on with what runs, and numbers the next one above every number it has seen.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import replace

from cluster.coordinator.member_room import reachable_slots, room_bytes
from cluster.coordinator.membership import (
    UNKNOWN,
    GroupPlanned,
    GroupRules,
    GroupSnapshot,
    Report,
    decide,
    is_of_unknown_epoch,
)
from cluster.coordinator.placement_change import AwaitedRevision, ChangeState, advance, begin, find, running_change
from cluster.coordinator.planning import plan_change, plan_given, plan_members
from cluster.coordinator.rebalance import epoch_to_rebalance, gain_worth_taking, rebalance_id
from cluster.coordinator.view import ClusterStatus, GroupPhase, PlacementStatus, RouterReport, View
from cluster.coordinator.work_reports import WorkReports
from cluster.planner.layer.error import PlacementError
from cluster.planner.plan_rules import BestChange
from model.arrays import FloatArray
from model.placement import Placement
from serving.engine.expert_load import ExpertLoad
from serving.errors import NotReadyError
from serving.link.epoch import Epoch, Member, PlacementChange, PlannedPlacement, ShardStatus, WorkRatio

logger = logging.getLogger(__name__)

FORGET_AFTER_S = 60.0       # reports of members and routers that are gone
_REVISION_JUMP = 1_000_000


class Coordinator:
    """Keeps what it hears, and answers. One event loop calls everything; plans are made in a thread beside it."""

    def __init__(self, rules: GroupRules, clock: Callable[[], float]) -> None:
        self._rules = rules
        self._clock = clock
        self._reports: dict[str, Report] = {}
        self._work = WorkReports(rules.plan.args.num_moe_layers, rules.plan.args.num_experts)
        self._routers: dict[str, tuple[RouterReport, float]] = {}
        self._highest_epoch_number = 0
        self._known_epoch_number = 0
        self._revision_above = 0
        self._last_epoch: Epoch | None = None       # that ran, or runs
        self._planned: GroupPlanned | None = None
        self._planning: asyncio.Task[None] | None = None
        self._ended = ""                            # why the last epoch has
        self._num_rows_considered = 0.0
        self._awaited = AwaitedRevision()
        self._view = decide(GroupSnapshot((), None, 0, 0, clock()), rules).view
        self._told_key = self._view.key
        self._changed = asyncio.Event()

    async def report(self, member: Member, status: ShardStatus, epoch: Epoch | None = None) -> bool:
        """Register a shard, or hear that it lives. True: it runs what is unknown here and should send that along."""
        known, now_s = self._reports.get(member.shard_id), self._clock()
        self._reports[member.shard_id] = Report(member, status, now_s, known.first_s if known else now_s)
        self._highest_epoch_number = max(self._highest_epoch_number, status.epoch_number)
        if epoch is not None and self._is_newer(epoch):
            self._adopt(epoch)
        self._refresh()
        return self._is_unknown(self._reports[member.shard_id])

    async def report_expert_load(self, shard_id: str, load: ExpertLoad, ratio: WorkRatio | None) -> None:
        """Count what the experts on a shard computed, and its work over its profile; None: too little was timed."""
        self._work.add(shard_id, load, ratio)

    async def report_router(self, report: RouterReport) -> PlacementStatus | None:
        """Hear from a router, and return what it shows of the placement; None without an epoch."""
        self._routers[report.router_id] = (report, self._clock())
        self._highest_epoch_number = max(self._highest_epoch_number, report.epoch_number)
        self._refresh()
        return self._placement_status() if self._view.epoch is not None else None

    async def forget_router(self, router_id: str) -> None:
        """Forget a router that stops; one that dies is forgotten after a while."""
        self._routers.pop(router_id, None)

    async def watch(self, seen_key: str, timeout_s: float) -> View:
        """Return the view, as soon as it is another than the caller has seen; the same one after timeout_s."""
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

    # The placement of the group that runs.

    async def placement(self) -> PlacementStatus:
        """Return what runs and what is prepared. Raises NotReadyError without an epoch."""
        self._refresh()
        return self._placement_status()

    async def change_placement(self, operation_id: str, why: str, placement: Placement | None) -> PlacementChange:
        """Change to `placement`; None: to the best for the counted load and the measured work. The same id twice is
        one change.

        Returns at once; `placement()` tells how far it is. Raises PlacementError, NotReadyError.
        """
        epoch = self._ready_epoch()
        known = _begun(epoch, operation_id)
        if known is not None:
            return known
        measured, counted = self._as_measured(epoch), self._work.counted(epoch)
        if placement is not None:
            target = await asyncio.to_thread(plan_given, placement, measured, self._rules.plan, counted)
            return self._begin(epoch, operation_id, why, target)
        best = await self._best_change(measured, counted)
        return self._begin(epoch, operation_id, why, best.target)

    async def rebalance(self) -> PlacementChange | None:
        """Look once whether another placement would be faster by the margin, for the counted load and measured work."""
        config, counted = self._rules.plan.config, self._work.counted(self._view.epoch)
        num_rows = float(counted.sum()) if counted is not None else 0.0
        epoch = epoch_to_rebalance(self._view, config, num_rows, self._num_rows_considered)
        if epoch is None:
            return None
        self._num_rows_considered = num_rows
        best = await self._best_change(self._as_measured(epoch), counted)
        gain = gain_worth_taking(best, config.rebalance_margin)
        logger.info("rebalance_considered epoch=%d revision=%d step_s=%.6f planned=%s", epoch.number, epoch.revision,
                    best.running_s, best.target.figures)
        if gain is None:
            return None
        self._num_rows_considered = 0.0
        measured = " and measured work" if any(self._work.ratios(epoch)) else ""
        return self._begin(epoch, rebalance_id(epoch), f"{gain:.0%} faster for the counted load{measured}", best.target)

    async def run(self, rebalance_interval_s: float) -> None:
        """Rebalance now and then, until cancelled. Everything else is done when somebody calls."""
        # While the shards start: the planner's solver takes a second to import.
        await asyncio.to_thread(importlib.import_module, "cluster.planner.group_plan")
        while True:
            await asyncio.sleep(rebalance_interval_s)
            try:
                await self.rebalance()
            except (PlacementError, NotReadyError) as error:
                logger.warning("rebalance_failed error=%s", error)
            except Exception:       # the next look may go better; the group goes on meanwhile
                logger.exception("rebalance_failed")

    async def _best_change(self, epoch: Epoch, counted: FloatArray | None) -> BestChange:
        for member, ratio in zip(epoch.members, self._work.ratios(epoch), strict=True):
            if ratio is not None:
                logger.info("planned_with_work shard_id=%s %s", member.shard_id, ratio)
        return await asyncio.to_thread(plan_change, epoch, self._rules.plan, counted,
                                       reachable_slots(epoch, self._reports, self._rules.demand))

    def _as_measured(self, epoch: Epoch) -> Epoch:
        return self._work.as_measured(epoch, {shard_id: report.member for shard_id, report in self._reports.items()})

    def _begin(self, planned_for: Epoch, operation_id: str, why: str, target: PlannedPlacement) -> PlacementChange:
        self._refresh()
        epoch = self._ready_epoch()         # it may be another one by now
        known = _begun(epoch, operation_id)
        if known is not None:
            return known
        busy = running_change(epoch)
        if busy is not None:
            raise PlacementError(f"change {busy.operation_id} is under way", fix="wait until it is done")
        if (epoch.number, epoch.revision) != (planned_for.number, planned_for.revision):
            raise PlacementError("the group changed while the placement was planned", fix="try again")
        epoch = begin(epoch, operation_id, why, target, self._rules.demand.expert_bytes)
        self._view = replace(self._view, epoch=epoch)
        self._refresh()
        change = find(self._view.epoch or epoch, operation_id) or epoch.changes[-1]
        logger.info("placement_change operation_id=%s moved_bytes=%d why=%s", operation_id, change.moved_bytes, why)
        return change

    def _ready_epoch(self) -> Epoch:
        if self._view.epoch is None or self._view.phase is not GroupPhase.READY:
            raise NotReadyError(f"the group is {self._view.phase}: {self._view.why}",
                                fix="try again when `moesaic status` says ready")
        return self._view.epoch

    def _placement_status(self) -> PlacementStatus:
        epoch = self._view.epoch
        if epoch is None:
            raise NotReadyError(f"no placement yet: {self._view.why}", fix="`moesaic status` says what is awaited")
        return PlacementStatus(epoch, self._view.next.revision if self._view.next else None,
                               self._work.load(epoch), self._work.ratios(epoch))

    # Epochs.

    def _is_newer(self, epoch: Epoch) -> bool:
        known = self._view.epoch
        return epoch.number > self._known_epoch_number or (
            known is not None and epoch.number == known.number and epoch.revision > known.revision)

    def _is_unknown(self, report: Report) -> bool:
        if is_of_unknown_epoch(report, self._known_epoch_number):
            return True
        epoch, prepared = self._view.epoch, self._view.next
        if epoch is None or report.status.epoch_number != epoch.number:
            return False
        return report.status.revision > max(epoch.revision, prepared.revision if prepared else 0)

    def _adopt(self, epoch: Epoch) -> None:
        """Go on with an epoch that another coordinator made. Its members have yet to report here."""
        logger.info("epoch_adopted number=%d revision=%d members=%d", epoch.number, epoch.revision, len(epoch.members))
        now_s = self._clock()
        self._know(epoch)
        # The other coordinator may have given out numbers that nobody has reported yet.
        self._revision_above = epoch.revision + secrets.randbelow(_REVISION_JUMP)
        for member in epoch.members:
            unheard = ShardStatus(member.shard_id, epoch.number, UNKNOWN)
            self._reports.setdefault(member.shard_id, Report(member, unheard, now_s, now_s))
        self._view = replace(self._view, epoch=epoch, next=None)

    async def _plan(self, members: tuple[Member, ...]) -> None:
        """Plan for members that start, in a thread: it may take seconds, and the members' reports must be heard."""
        try:
            self._planned = await asyncio.to_thread(plan_members, members, self._rules, self._last_epoch)
        except Exception as error:
            logger.exception("plan_failed")
            self._planned = GroupPlanned(tuple(member.shard_id for member in members), None,
                                         f"the placement could not be planned: {error!r}")
        finally:
            self._planning = None       # whatever ended it, who is still to be planned for is planned for anew
        self._refresh()

    def _refresh(self) -> None:
        """Decide again, and wake everybody who watches when something has changed."""
        self._forget_the_silent()
        decision = decide(self._snapshot(), self._rules)
        view = decision.view
        if view.epoch is not None:
            self._know(view.epoch)
            if view.phase is GroupPhase.READY:
                view = self._with_change(view, view.epoch)
        self._view, self._ended = view, decision.ended
        if decision.to_plan and (self._planning is None or self._planning.done()):
            self._planning = asyncio.create_task(self._plan(decision.to_plan))
        if view.key != self._told_key:
            self._told_key = view.key
            number, revision = (view.epoch.number, view.epoch.revision) if view.epoch else (0, 0)
            logger.info("view_changed epoch=%d revision=%d next=%s phase=%s why=%s", number, revision,
                        view.next.revision if view.next else None, view.phase, view.why)
            self._changed.set()
            self._changed = asyncio.Event()

    def _with_change(self, view: View, epoch: Epoch) -> View:
        """Return the view with what comes of a change of placement that runs."""
        reports = [self._reports[member.shard_id] for member in epoch.members]
        prepared = self._view.next if self._view.epoch and self._view.epoch.number == epoch.number else None
        demand, now_s = self._rules.demand, self._clock()
        state = advance(ChangeState(epoch, prepared), [report.status for report in reports],
                        [room_bytes(report, demand) for report in reports], demand.expert_bytes,
                        self._revision_above, self._awaited.is_late(prepared, now_s))
        self._awaited = self._awaited.followed_by(state.next, now_s)
        return replace(view, epoch=state.epoch, next=state.next)

    def _forget_the_silent(self) -> None:
        now_s = self._clock()
        self._reports = {shard_id: report for shard_id, report in self._reports.items()
                         if now_s - report.at_s <= FORGET_AFTER_S}
        self._work.forget_others(self._reports)
        self._routers = {router_id: (report, at_s) for router_id, (report, at_s) in self._routers.items()
                         if now_s - at_s <= self._rules.lost_after_s}

    def _snapshot(self) -> GroupSnapshot:
        return GroupSnapshot(tuple(self._reports.values()), self._view.epoch, self._highest_epoch_number,
                             self._known_epoch_number, self._clock(), self._planned, self._ended)

    def _know(self, epoch: Epoch) -> None:
        self._last_epoch = epoch
        self._known_epoch_number = max(self._known_epoch_number, epoch.number)
        self._highest_epoch_number = max(self._highest_epoch_number, epoch.number)


def _begun(epoch: Epoch, operation_id: str) -> PlacementChange | None:
    """Return the change of this id that runs or is done. One that has failed may begin anew."""
    known = find(epoch, operation_id)
    return known if known is not None and known.state != "failed" else None
