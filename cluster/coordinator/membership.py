"""Who is in the group, and what the group does next. Pure: a snapshot of reports in, a view out.

The group goes WAITING -> LOADING -> JOINING -> READY, and back to WAITING when a member of its epoch is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.coordinator.view import GroupPhase, ShardState, View
from cluster.planner.memory_plan import MemoryDemand
from cluster.planner.plan_rules import PlanRules
from serving.link.epoch import Epoch, Member, PlacementChange, PlannedPlacement, ShardStatus

_IN_EPOCH = (ShardState.LOADING, ShardState.LOADED, ShardState.JOINING, ShardState.READY)
_CAN_JOIN = (ShardState.LOADED, ShardState.JOINING, ShardState.READY)
UNKNOWN = "unknown"     # a member that the coordinator knows of only from another one's epoch


@dataclass(frozen=True, slots=True)
class Report:
    """What a shard last said of itself, and when."""

    member: Member
    status: ShardStatus
    at_s: float


@dataclass(frozen=True, slots=True)
class GroupRules:
    num_members: int                    # the group starts when so many are there
    pools: tuple[str, ...]              # ranks are ordered by pool, node name and shard id
    plan: PlanRules
    lost_after_s: float                 # a member that did not report for so long is gone

    @property
    def demand(self) -> MemoryDemand:
        return self.plan.demand


@dataclass(frozen=True, slots=True)
class GroupPlanned:
    """What the planner made of some members."""

    shard_ids: tuple[str, ...]
    placement: PlannedPlacement | None
    why: str = ""                               # there is none
    changes: tuple[PlacementChange, ...] = ()   # of the epoch before


@dataclass(frozen=True, slots=True)
class Decision:
    """The state of the group, and the members that the coordinator is to plan a placement for."""

    view: View
    to_plan: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupSnapshot:
    reports: tuple[Report, ...]
    epoch: Epoch | None                 # the one that runs, or is being brought up
    highest_epoch_number: int           # highest number ever heard of
    known_epoch_number: int             # highest number of which the coordinator knows more than the number
    now_s: float
    planned: GroupPlanned | None = None


def decide(snapshot: GroupSnapshot, rules: GroupRules) -> Decision:
    """Go on with the epoch, make the next one, or say what is missing for it."""
    over = _why_epoch_is_over(snapshot, snapshot.epoch, rules) if snapshot.epoch else None
    if snapshot.epoch is not None and over is None:
        return Decision(_view_of_running(snapshot, snapshot.epoch))
    unknown = [report.status.epoch_number for report in snapshot.reports
               if is_of_unknown_epoch(report, snapshot.known_epoch_number)]
    if unknown:
        return Decision(_waiting(f"epoch {max(unknown)} runs; its members are asked about it"))
    present = sorted((report.member for report in snapshot.reports if _is_present(report, snapshot, rules)),
                     key=lambda member: (_pool_index(member, rules), member.node_name, member.shard_id))
    ended = f"epoch {snapshot.epoch.number} ended: {over}; " if snapshot.epoch and over else ""
    if len(present) < rules.num_members:
        return Decision(_waiting(ended + _who_is_missing(present, snapshot, rules)))
    members = tuple(present[:rules.num_members])
    planned = snapshot.planned
    if planned is None or planned.shard_ids != tuple(member.shard_id for member in members):
        return Decision(_waiting(f"{ended}the placement is planned"), to_plan=members)
    if planned.placement is None:
        return Decision(View(GroupPhase.WAITING, None, f"{ended}{planned.why}", is_too_small=True))
    epoch = Epoch(snapshot.highest_epoch_number + 1, members, planned.placement.placement, rendezvous="",
                  shares=planned.placement.shares, figures=planned.placement.figures, changes=planned.changes)
    return Decision(View(GroupPhase.LOADING, epoch, f"{len(members)} members load their weights"))


def _waiting(why: str) -> View:
    return View(GroupPhase.WAITING, None, why)


def is_of_unknown_epoch(report: Report, known_epoch_number: int) -> bool:
    """The shard serves, or comes to serve, an epoch that another coordinator made: it must tell before a new one is."""
    return report.status.epoch_number > known_epoch_number and report.status.state in _IN_EPOCH


def _view_of_running(snapshot: GroupSnapshot, epoch: Epoch) -> View:
    reports = {report.member.shard_id: report for report in snapshot.reports
               if report.status.epoch_number == epoch.number}
    of_members = [reports[member.shard_id].status.state if member.shard_id in reports else UNKNOWN
                  for member in epoch.members]
    num_ready = of_members.count(ShardState.READY)
    if num_ready == len(of_members):
        return View(GroupPhase.READY, epoch)
    if all(state in _CAN_JOIN for state in of_members):
        if not epoch.rendezvous:
            epoch = replace(epoch, rendezvous=f"tcp://{reports[epoch.members[0].shard_id].member.store_address}")
        return View(GroupPhase.JOINING, epoch, "the members form their process group")
    return View(GroupPhase.LOADING, epoch, f"{len(of_members)} members load their weights")


def _why_epoch_is_over(snapshot: GroupSnapshot, epoch: Epoch, rules: GroupRules) -> str | None:
    reports = {report.member.shard_id: report for report in snapshot.reports}
    for member in epoch.members:
        report = reports.get(member.shard_id)
        if report is None or not _is_present(report, snapshot, rules):
            reason = report.status.detail if report else ""
            return f"shard {member.shard_id} on node {member.node_name} is gone{': ' if reason else ''}{reason}"
        if report.status.epoch_number == epoch.number and report.status.state == ShardState.WAITING:
            return f"shard {member.shard_id} on node {member.node_name} left it: {report.status.detail}"
    return None


def _is_present(report: Report, snapshot: GroupSnapshot, rules: GroupRules) -> bool:
    return (report.status.state != ShardState.FAILED and snapshot.now_s - report.at_s <= rules.lost_after_s
            and report.member.pool in rules.pools)


def _pool_index(member: Member, rules: GroupRules) -> int:
    return rules.pools.index(member.pool)


def _who_is_missing(present: list[Member], snapshot: GroupSnapshot, rules: GroupRules) -> str:
    here = ", ".join(member.node_name for member in present) or "none"
    failed = {report.status.detail: report.member.node_name for report in snapshot.reports
              if report.status.state == ShardState.FAILED}
    reasons = "".join(f"; a shard failed on node {node}: {detail}" for detail, node in sorted(failed.items()))
    return f"{len(present)} of {rules.num_members} shards are here ({here}){reasons}"
