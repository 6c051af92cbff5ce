"""Decides who is in the group, and what the group does next. Pure: a snapshot of reports in, a view out.

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
    """Holds what a shard has said of itself."""

    member: Member
    status: ShardStatus
    at_s: float                 # the last time
    first_s: float = 0.0        # the first time


@dataclass(frozen=True, slots=True)
class GroupRules:
    num_members: int                    # the group starts when so many are there
    pools: tuple[str, ...]              # ranks are ordered by pool, node name and shard id
    plan: PlanRules
    lost_after_s: float                 # a member that did not report for so long is gone
    replaced_after_s: float             # likewise, when another process has started on its node, in its pool, since

    @property
    def demand(self) -> MemoryDemand:
        return self.plan.demand


@dataclass(frozen=True, slots=True)
class GroupPlanned:
    """Holds what the planner made of some members."""

    shard_ids: tuple[str, ...]
    placement: PlannedPlacement | None
    why: str = ""                               # there is none
    changes: tuple[PlacementChange, ...] = ()   # of the epoch before


@dataclass(frozen=True, slots=True)
class Decision:
    """Holds the state of the group, and the members that the coordinator is to plan a placement for."""

    view: View
    to_plan: tuple[Member, ...] = ()
    ended: str = ""             # why the last epoch has, until there is another


@dataclass(frozen=True, slots=True)
class GroupSnapshot:
    reports: tuple[Report, ...]
    epoch: Epoch | None                 # the one that runs, or is being brought up
    highest_epoch_number: int           # highest number ever heard of
    known_epoch_number: int             # highest number of which the coordinator knows more than the number
    now_s: float
    planned: GroupPlanned | None = None
    ended: str = ""                     # why the last epoch has, as decided before


def decide(snapshot: GroupSnapshot, rules: GroupRules) -> Decision:
    """Go on with the epoch, make the next one, or say what is missing for it."""
    over = _why_epoch_is_over(snapshot, snapshot.epoch, rules) if snapshot.epoch else None
    if snapshot.epoch is not None and over is None:
        return Decision(_view_of_running(snapshot, snapshot.epoch))
    unknown = [report.status.epoch_number for report in snapshot.reports
               if is_of_unknown_epoch(report, snapshot.known_epoch_number)]
    if unknown:
        return Decision(_waiting(snapshot, f"epoch {max(unknown)} runs; its members are asked about it"))
    present = sorted((report for report in snapshot.reports if _is_present(report, snapshot, rules)),
                     key=lambda report: _order(report.member, rules))
    ended = f"epoch {snapshot.epoch.number} ended: {over}; " if snapshot.epoch and over else snapshot.ended
    if len(present) < rules.num_members:
        return Decision(_waiting(snapshot, ended + _who_is_missing(present, snapshot, rules)), ended=ended)
    chosen = present[:rules.num_members]
    leaving = [report for report in chosen if report.status.state in _IN_EPOCH]
    if leaving:
        where = ", ".join(f"shard {report.member.shard_id} on node {report.member.node_name} (epoch "
                          f"{report.status.epoch_number})" for report in leaving)
        return Decision(_waiting(snapshot, f"{ended}waiting until all have left: {where}"), ended=ended)
    return _next_epoch(snapshot, tuple(report.member for report in chosen), ended)


def _next_epoch(snapshot: GroupSnapshot, members: tuple[Member, ...], ended: str) -> Decision:
    """Decide on an epoch of these members, once their placement is planned."""
    planned = snapshot.planned
    if planned is None or planned.shard_ids != tuple(member.shard_id for member in members):
        return Decision(_waiting(snapshot, f"{ended}the placement is planned"), members, ended)
    if planned.placement is None:
        return Decision(replace(_waiting(snapshot, f"{ended}{planned.why}"), is_too_small=True), ended=ended)
    epoch = Epoch(snapshot.highest_epoch_number + 1, members, planned.placement.placement, rendezvous="",
                  shares=planned.placement.shares, figures=planned.placement.figures, changes=planned.changes)
    return Decision(View(GroupPhase.LOADING, epoch, f"{len(members)} members load their weights",
                         ended_epoch_number=snapshot.known_epoch_number))


def _waiting(snapshot: GroupSnapshot, why: str) -> View:
    """Show that no epoch runs: whoever is still in one that the coordinator knows is to leave it."""
    return View(GroupPhase.WAITING, None, why, ended_epoch_number=snapshot.known_epoch_number)


def is_of_unknown_epoch(report: Report, known_epoch_number: int) -> bool:
    """Return whether the shard is in an epoch that another coordinator made: it must tell before a new one is made."""
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
    limit_s = rules.replaced_after_s if _is_replaced(report, snapshot) else rules.lost_after_s
    return (report.status.state != ShardState.FAILED and snapshot.now_s - report.at_s <= limit_s
            and report.member.pool in rules.pools)


def _is_replaced(report: Report, snapshot: GroupSnapshot) -> bool:
    """Return whether another process has begun in its place since it was last heard: there is one of a pool on a node,
    and a dead one is started anew."""
    place = (report.member.pool, report.member.node_id)
    return any((other.member.pool, other.member.node_id) == place and other.first_s > report.at_s
               for other in snapshot.reports)


def _order(member: Member, rules: GroupRules) -> tuple[int, str, str]:
    return rules.pools.index(member.pool), member.node_name, member.shard_id


def _who_is_missing(present: list[Report], snapshot: GroupSnapshot, rules: GroupRules) -> str:
    here = ", ".join(report.member.node_name for report in present) or "none"
    failed = {report.status.detail: report.member.node_name for report in snapshot.reports
              if report.status.state == ShardState.FAILED}
    reasons = "".join(f"; a shard failed on node {node}: {detail}" for detail, node in sorted(failed.items()))
    return f"{len(present)} of {rules.num_members} shards are here ({here}){reasons}"
