"""Observes shards and routers, decides epochs (by cluster/coordinator/membership.py), tells everybody. No Ray in here.

All its state is soft. A shard that reports an epoch or a revision which the coordinator does not know is asked to send
it, so after a restart the coordinator goes on with what runs, and numbers the next one above every number it has seen.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace

from cluster.coordinator.autoscaling import Heard
from cluster.coordinator.leave_orders import LeaveOrders
from cluster.coordinator.leaving import Drain, slots_without
from cluster.coordinator.member_room import reachable_slots, room_bytes
from cluster.coordinator.membership import UNKNOWN, GroupPlanned, GroupRules, GroupSnapshot, decide, runs_unknown
from cluster.coordinator.membership_history import MembershipHistory, Seen
from cluster.coordinator.placement_change import AwaitedRevision, ChangeState, advance, begin, begun, find, refuse_late
from cluster.coordinator.planning import plan_change, plan_given, plan_members
from cluster.coordinator.pool_scale import PoolScale, PoolSizes, ServeReplicas, choose_leavers
from cluster.coordinator.quarrels import Quarrel, kept_out, noted
from cluster.coordinator.rebalance import epoch_to_rebalance, rebalance_id, why_worth_taking
from cluster.coordinator.reports import Report, shown
from cluster.coordinator.same_model import left_out, with_left_out
from cluster.coordinator.sleep import asleep_since, with_sleep
from cluster.coordinator.view import (
    NOTHING,
    AutoscalerStatus,
    ClusterStatus,
    GroupPhase,
    PlacementStatus,
    Remembered,
    RouterReport,
    View,
)
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
NUMBER_JUMP = 1_000_000     # two coordinators that draw from so many do not give out the same numbers


class Coordinator:
    """Keeps what it hears, and answers. One event loop calls everything; plans are made in a thread beside it.

    `numbers_above`: of its epochs. A coordinator may be lost after it has told one member of an epoch, and before
    anybody has reported that, so the next one begins elsewhere.
    """

    def __init__(self, rules: GroupRules, clock: Callable[[], float],
                 wall_clock: Callable[[], float] = time.time, numbers_above: int = 0) -> None:
        self._rules = rules
        self.scaling: AutoscalerStatus | None = None        # set by who lets the sizes follow the load
        self._sizes = PoolSizes(rules.size)
        self._clock = clock
        self._wall_clock = wall_clock
        self._history = MembershipHistory(clock(), wall_clock())
        self._reports: dict[str, Report] = {}
        self._work = WorkReports(rules.plan.args.num_moe_layers, rules.plan.args.num_experts)
        self._routers: dict[str, tuple[RouterReport, float]] = {}
        self._highest_epoch_number = numbers_above
        self._known_epoch_number = 0
        self._revision_above = 0
        self._last_epoch: Epoch | None = None       # that ran, or runs
        self._planned: GroupPlanned | None = None
        self._planning: asyncio.Task[None] | None = None
        self._orders = LeaveOrders(rules.plan)
        self._leaving_since_s: dict[str, float] = {}        # by shard id
        self._left_out: dict[str, str] = {}         # shards that compute another model, and why we say so
        self._quarrels: tuple[Quarrel, ...] = ()
        self._kept_out: dict[str, str] = {}         # shards that a quarrel keeps out of the epoch, and with whom it is
        self._asleep_since_s: float | None = None   # on the wall clock
        self._ended = ""                            # why the last epoch has
        self._num_rows_considered = 0.0
        self._awaited = AwaitedRevision()
        self._view = decide(GroupSnapshot((), None, 0, 0, clock()), rules).view
        self._told_key = self._view.key
        self._changed = asyncio.Event()

    async def report(self, member: Member, status: ShardStatus, epoch: Epoch | None = None,
                     remembered: Remembered = NOTHING) -> bool:
        """Register a shard, or hear that it lives. True: it runs what is unknown here and should send that along, with
        what it remembers of the coordinator that made it."""
        known, now_s = self._reports.get(member.shard_id), self._clock()
        self._reports[member.shard_id] = Report(member, status, now_s, known.first_s if known else now_s)
        self._highest_epoch_number = max(self._highest_epoch_number, status.epoch_number)
        if epoch is not None and self._is_newer(epoch):
            self._adopt(epoch, remembered)
        self._refresh()
        return runs_unknown(self._reports[member.shard_id], self._known_epoch_number, self._view)

    async def forget_shard(self, shard_id: str) -> None:
        """Forget a shard that ends, unless the group has yet to go on without it."""
        if self._view.epoch is None or self._view.epoch.rank_of(shard_id) is None:
            self._reports.pop(shard_id, None)
            self._refresh()

    async def report_expert_load(self, shard_id: str, load: ExpertLoad, ratio: WorkRatio | None) -> None:
        """Count what the experts on a shard computed, and its work over its profile; None: too little was timed."""
        self._work.add(shard_id, load, ratio)

    async def report_router(self, report: RouterReport) -> PlacementStatus | None:
        """Hear from a router, and return what it shows of the placement; None without an epoch."""
        self._routers[report.router_id] = (report, self._clock())
        self._history.note_moved(report.router_id, report.num_moved)
        self._highest_epoch_number = max(self._highest_epoch_number, report.epoch_number)
        self._refresh()
        return self._placement_status() if self._view.epoch is not None else None

    async def forget_router(self, router_id: str) -> None:
        """Forget a router that stops; one that dies is forgotten after a while."""
        self._routers.pop(router_id, None)
        self._history.forget_router(router_id)

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
        shards = shown(self._reports, self._kept_out | self._left_out)
        routers = tuple(self._routers[router_id][0] for router_id in sorted(self._routers))
        return ClusterStatus(self._view, shards, routers, self._history.changes, self.scaling)

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
        known = begun(epoch, operation_id)
        if known is not None:
            return known
        measured, counted = self._as_measured(epoch), self._work.counted(epoch)
        if placement is not None:
            target = await asyncio.to_thread(plan_given, placement, measured, self._rules.plan, counted)
            return self._begin(epoch, operation_id, why, target)
        best = await self._best_change(measured, counted)
        return self._begin(epoch, operation_id, why, best.target)

    async def rebalance(self) -> PlacementChange | None:
        """Look once whether another placement is worth a change, for the counted load and measured work."""
        config, counted = self._rules.plan.config, self._work.counted(self._view.epoch)
        num_rows = float(counted.sum()) if counted is not None else 0.0
        epoch = epoch_to_rebalance(self._view, self._rules.plan, num_rows, self._num_rows_considered)
        if epoch is None:
            return None
        self._num_rows_considered = num_rows
        best = await self._best_change(self._as_measured(epoch), counted)
        why = why_worth_taking(best, config.rebalance_margin)
        logger.info("rebalance_considered epoch=%d revision=%d step_s=%.6f planned=%s", epoch.number, epoch.revision,
                    best.running_s, best.target.figures)
        if why is None:
            return None
        self._num_rows_considered = 0.0
        measured = " and measured work" if any(self._work.ratios(epoch)) else ""
        return self._begin(epoch, rebalance_id(epoch), f"{why} for the counted load{measured}", best.target)

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

    # Members that leave.

    async def drain(self, target: str, operation_id: str) -> Drain:
        """Let a shard, or all shards of a node, leave: nothing new is sent there, their experts move to others, and the
        group goes on without them.

        Returns how far it is, at once where it has begun: the same id twice is one operation. Raises PlacementError
        for a name that is not known, and when the others cannot hold the model.
        """
        self._orders.drain(target, operation_id, self._view, self._reports)
        self._refresh()
        return self._orders.progress(operation_id, self._view, self._reports)

    async def scale(self, pool: str, num: int, shard_id: str | None = None) -> PoolScale:
        """Let a pool have so many shards from now on. Where it has more, those leave who can best be missed, the first
        of them `shard_id`.

        Returns how far it is, at once where that is wanted already. Raises PlacementError, and changes nothing then.
        """
        self._refresh()
        self._sizes.check(pool, num)
        leaving = choose_leavers(pool, num, shard_id, self._live(), self._view.epoch, self._rules.plan)
        self._orders.shrink(pool, leaving)
        self._sizes.want(pool, num)
        self._refresh()
        return self._sizes.progress(pool, self._view)

    async def sleep(self) -> None:
        """Let all shards go, until a request comes. Raises PlacementError when one has."""
        self._refresh()
        self._sizes.sleep([report.load for report, _ in self._routers.values()])
        self._refresh()

    async def follow_serve(self, serve: ServeReplicas) -> None:
        """Have Serve keep as many replicas as the pools are to have, until cancelled."""
        await self._sizes.follow(serve, self._refresh)

    def _live(self) -> list[Report]:
        heard_since_s = self._clock() - self._rules.lost_after_s
        return [self._orders.with_order(report) for report in self._reports.values() if report.at_s >= heard_since_s]

    def heard(self) -> Heard | None:
        """Return what the autoscaler decides by; None while no group runs, unless the service sleeps."""
        self._refresh()
        epoch, loads = self._view.epoch, {router_id: report.load for router_id, (report, _) in self._routers.items()}
        if self._sizes.size.is_asleep:
            return Heard(self._sizes.size.of_pool, None, (), loads)
        if epoch is None or self._view.phase is not GroupPhase.READY:
            return None
        return Heard(self._sizes.size.of_pool, self._as_measured(epoch), self._view.leaving, loads)

    async def _best_change(self, epoch: Epoch, counted: FloatArray | None) -> BestChange:
        for member, ratio in zip(epoch.members, self._work.ratios(epoch), strict=True):
            if ratio is not None:
                logger.info("planned_with_work shard_id=%s %s", member.shard_id, ratio)
        slots = slots_without(epoch, self._view.leaving, reachable_slots(epoch, self._reports, self._rules.demand))
        return await asyncio.to_thread(plan_change, epoch, self._rules.plan, counted, slots)

    def _as_measured(self, epoch: Epoch) -> Epoch:
        return self._work.as_measured(epoch, {shard_id: report.member for shard_id, report in self._reports.items()})

    def _begin(self, planned_for: Epoch, operation_id: str, why: str, target: PlannedPlacement) -> PlacementChange:
        self._refresh()
        epoch = self._ready_epoch()         # it may be another one by now
        known = begun(epoch, operation_id)
        if known is not None:
            return known
        refuse_late(epoch, planned_for)
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
                               self._work.load(epoch), self._work.ratios(epoch), self._history.changes, self.scaling)

    # Epochs.

    def _is_newer(self, epoch: Epoch) -> bool:
        known = self._view.epoch
        return epoch.number > self._known_epoch_number or (
            known is not None and epoch.number == known.number and epoch.revision > known.revision)

    def _adopt(self, epoch: Epoch, remembered: Remembered) -> None:
        """Go on with an epoch that another coordinator made. Its members have yet to report here."""
        logger.info("epoch_adopted number=%d revision=%d members=%d", epoch.number, epoch.revision, len(epoch.members))
        now_s = self._clock()
        self._know(epoch)
        self._history.adopt(epoch, remembered.changes)
        self._orders.adopt(remembered.orders)
        self._sizes.adopt(remembered.sizes)
        # The other coordinator may have given out numbers that nobody has reported yet.
        self._revision_above = epoch.revision + secrets.randbelow(NUMBER_JUMP)
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
        reports, now_s = tuple(self._reports.values()), self._clock()
        self._quarrels = noted(self._quarrels, self._last_epoch, reports, now_s)
        self._left_out = left_out(reports, self._last_epoch, now_s - self._rules.lost_after_s)
        decision = decide(self._snapshot(), replace(self._rules, size=self._sizes.size))
        size, view = self._sizes.size, with_left_out(decision.view, self._left_out)
        self._asleep_since_s = asleep_since(self._asleep_since_s, size, view.phase, self._wall_clock())
        view = with_sleep(view, self._asleep_since_s, size)
        if view.epoch is not None:
            self._know(view.epoch)
            if view.phase is GroupPhase.READY:
                view = self._with_change(view, view.epoch)
        if view.coming is not None:
            self._know_number(view.coming.number)
        view = replace(view, dismissed=self._sizes.dismissed(view, self._live()))
        self._view, self._ended = view, decision.ended
        self._note_membership(reports, now_s)
        self._view = view = replace(view, remembered=self._remembered())
        if decision.to_plan and (self._planning is None or self._planning.done()):
            self._planning = asyncio.create_task(self._plan(decision.to_plan))
        if view.key != self._told_key:
            self._told_key = view.key
            number, revision = (view.epoch.number, view.epoch.revision) if view.epoch else (0, 0)
            logger.info("view_changed epoch=%d revision=%d next=%s phase=%s why=%s", number, revision,
                        view.next.revision if view.next else None, view.phase, view.why)
            self._changed.set()
            self._changed = asyncio.Event()

    def _note_membership(self, reports: tuple[Report, ...], now_s: float) -> None:
        self._kept_out = kept_out(self._quarrels, self._view.epoch, reports, now_s)
        seen = Seen(self._view, reports, self._ended, now_s, self._wall_clock(), frozenset(self._kept_out))
        if (change := self._history.observe(seen)) is not None:
            logger.info("membership_changed %s", change)

    def _remembered(self) -> Remembered:
        """Return nothing while no epoch is known, for members may know more."""
        if self._last_epoch is None:
            return NOTHING
        return Remembered(self._history.changes, self._orders.remembered(self._reports), self._sizes.untold)

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
        reports = tuple(self._orders.with_order(report) for shard_id, report in self._reports.items()
                        if shard_id not in self._left_out)
        now_s = self._clock()
        self._leaving_since_s = {report.member.shard_id: self._leaving_since_s.get(report.member.shard_id, now_s)
                                 for report in reports if report.status.is_leaving}
        return GroupSnapshot(reports, self._view.epoch, self._highest_epoch_number,
                             self._known_epoch_number, now_s, self._planned, self._ended, self._last_epoch,
                             self._view.coming, self._leaving_since_s, self._quarrels)

    def _know(self, epoch: Epoch) -> None:
        self._last_epoch = epoch
        self._know_number(epoch.number)

    def _know_number(self, epoch_number: int) -> None:
        self._known_epoch_number = max(self._known_epoch_number, epoch_number)
        self._highest_epoch_number = max(self._highest_epoch_number, epoch_number)
