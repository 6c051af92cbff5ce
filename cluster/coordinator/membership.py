"""Decides who is in the group, and what the group does next. Pure: a snapshot of reports in, a view out.

The group goes WAITING -> LOADING -> JOINING -> READY, and back to WAITING when a member of its epoch is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.coordinator.evacuation import leave, leavers
from cluster.coordinator.group_size import GroupSize, may_enter, may_start, who_is_missing
from cluster.coordinator.member_room import memory_of
from cluster.coordinator.placement_change import running_change
from cluster.coordinator.quarrels import Pair, Quarrel, accusations, kept_apart, unheard_by, ways_apart
from cluster.coordinator.regroup import Remains, enlarged, may_join, regroup, remains_of
from cluster.coordinator.reports import HAS_LEFT, IN_EPOCH, Report
from cluster.coordinator.view import GroupPhase, ShardState, View
from cluster.planner.layer.error import PlacementError
from cluster.planner.memory_fit import members_fit
from cluster.planner.memory_plan import MemoryDemand
from cluster.planner.plan_rules import PlanRules
from serving.link.epoch import Epoch, Member, PlacementChange, PlannedPlacement

_CAN_JOIN = (ShardState.LOADED, ShardState.JOINING, ShardState.READY)
HAND_OVER_S = 10.0      # for the sequences of a member that leaves, to be computed on others before the group ends
UNKNOWN = "unknown"     # a member that the coordinator knows of only from another one's epoch


@dataclass(frozen=True, slots=True)
class GroupRules:
    size: GroupSize                     # ranks are ordered by pool, node name and shard id
    plan: PlanRules
    lost_after_s: float                 # a member that did not report for so long is gone
    replaced_after_s: float             # likewise, when another process has started on its node, in its pool, since

    @property
    def num_members(self) -> int:
        return self.size.num_members

    @property
    def pools(self) -> tuple[str, ...]:
        return self.size.pools

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
    last: Epoch | None = None           # the one that runs, or ran
    coming: Epoch | None = None         # the epoch after the one that runs, for which newcomers load
    leaving_since_s: Mapping[str, float] = field(default_factory=dict)      # when each was first heard to leave
    quarrels: tuple[Quarrel, ...] = ()

    def kept_apart(self) -> frozenset[Pair]:
        return kept_apart(self.quarrels, self.reports, self.now_s)


def decide(snapshot: GroupSnapshot, rules: GroupRules) -> Decision:
    """Go on with the epoch, make the next one, or say what is missing for it."""
    over = _why_epoch_is_over(snapshot, snapshot.epoch, rules) if snapshot.epoch else None
    if snapshot.epoch is not None and over is None:
        return _running(snapshot, snapshot.epoch, rules)
    unknown = [report.status.epoch_number for report in snapshot.reports
               if is_of_unknown_epoch(report, snapshot.known_epoch_number)]
    if unknown:
        return Decision(_waiting(snapshot, f"epoch {max(unknown)} runs; its members are asked about it"))
    ended = f"epoch {snapshot.epoch.number} ended: {over}; " if snapshot.epoch and over else snapshot.ended
    if rules.size.is_asleep:
        return Decision(_waiting(snapshot, ended), ended=ended)
    present = [report for report in snapshot.reports if _is_present(report, snapshot, rules)]
    last = snapshot.epoch or snapshot.last
    return _first_epoch(snapshot, present, rules, ended) if last is None else \
        _after_epoch(snapshot, last, present, rules, ended)


def _after_epoch(snapshot: GroupSnapshot, last: Epoch, present: list[Report], rules: GroupRules,
                 ended: str) -> Decision:
    """Let those go on that are left of an epoch, at once where they can hold the model."""
    remains = remains_of(last, snapshot.reports, {report.member.shard_id for report in present})
    if remains.pending:
        where = ", ".join(f"shard {report.member.shard_id} on node {report.member.node_name} (epoch "
                          f"{report.status.epoch_number})" for report in remains.pending.values())
        return Decision(_waiting(snapshot, f"{ended}waiting until all have left: {where}"), ended=ended)
    epoch, why = _regrouped(last, remains, snapshot, rules)
    if epoch is not None:
        return Decision(View(GroupPhase.LOADING, epoch, f"{ended}{len(epoch.members)} members go on{why}",
                             leaving=leavers(last, snapshot.reports),
                             ended_epoch_number=snapshot.known_epoch_number), ended=ended)
    gone = {last.members[rank].shard_id for rank in remains.gone(last)}
    return _first_epoch(snapshot, [report for report in present if report.member.shard_id not in gone], rules,
                        f"{ended}{why}")


def _regrouped(last: Epoch, remains: Remains, snapshot: GroupSnapshot, rules: GroupRules) -> tuple[Epoch | None, str]:
    """Return the epoch of those that are left, and whom it keeps out; None, and why they cannot go on."""
    why, pairs = "", snapshot.kept_apart()
    for here in (here for here in (remains.without_leavers, remains) if here.here):
        for out in ways_apart(pairs, here.here.values()):
            try:
                epoch = regroup(last, here.less(out), rules.demand, snapshot.highest_epoch_number + 1)
            except PlacementError as error:
                why = f"{error}; "
            else:
                return epoch, f" without {', '.join(sorted(out))}, which others do not hear" if out else ""
    return None, why


def _first_epoch(snapshot: GroupSnapshot, present: list[Report], rules: GroupRules, ended: str) -> Decision:
    present = sorted((report for report in present if not report.status.is_leaving),
                     key=lambda report: _order(report.member, rules))
    present = _who_hear_each_other(present, snapshot, rules)
    chosen = may_enter((report.member for report in present), (), rules.size)
    quiet_s = snapshot.now_s - max((report.first_s for report in present), default=0.0)
    if not may_start(chosen, rules.size, quiet_s):
        return Decision(_waiting(snapshot, ended + _who_is_missing(present, snapshot, rules)), ended=ended)
    return _next_epoch(snapshot, tuple(chosen), ended, rules)


def _who_hear_each_other(present: list[Report], snapshot: GroupSnapshot, rules: GroupRules) -> list[Report]:
    """Return as many of them as can be, if possible so many that they can hold the model."""
    pairs = snapshot.kept_apart() | accusations(present)
    ways = [[report for report in present if report.member.shard_id not in out] for out in ways_apart(pairs, present)]
    return next((way for way in ways if members_fit(
        [memory_of(report.member) for report in way], rules.plan).is_enough), ways[0]) if len(ways) > 1 else ways[0]


def _running(snapshot: GroupSnapshot, epoch: Epoch, rules: GroupRules) -> Decision:
    """Show the epoch that runs, let go who is to leave, and take in who waits to join, when they have loaded."""
    leaving = leavers(epoch, snapshot.reports)
    view, coming = replace(_view_of_running(snapshot, epoch), leaving=leaving), snapshot.coming
    if view.phase is not GroupPhase.READY or running_change(epoch) is not None:
        return Decision(view)
    if leaving:
        view = _with_leavers_going(view, snapshot, rules)
        if view.epoch != epoch:
            return Decision(view)
    apart = snapshot.kept_apart() | accusations(snapshot.reports)
    joiners = sorted((report for report in snapshot.reports if _is_present(report, snapshot, rules)
                      and may_join(report, epoch, coming) and not unheard_by(report.member, apart, epoch.members)),
                     key=lambda report: _order(report.member, rules))
    staying = [member for member in epoch.members if member.shard_id not in leaving]
    new = tuple(may_enter((report.member for report in joiners), staying, rules.size))
    if not new:
        return Decision(view)
    ids = tuple(member.shard_id for member in (*epoch.members, *new))
    if coming is None or ids != tuple(member.shard_id for member in coming.members):
        planned = snapshot.planned
        if planned is None or planned.shard_ids != ids:
            return Decision(view, (*epoch.members, *new))
        if planned.placement is None:
            return Decision(view)
        coming = enlarged(epoch, new, planned.placement, snapshot.highest_epoch_number + 1, rules.demand.expert_bytes)
    if all(report.status.state == ShardState.LOADED for report in joiners if report.member in new):
        return Decision(_view_after(view, coming, f"{len(new)} members join"))
    return Decision(replace(view, coming=coming))


def _with_leavers_going(view: View, snapshot: GroupSnapshot, rules: GroupRules) -> View:
    """Show how the group comes nearer to go on without who leaves: without as many of them as can be missed."""
    epoch, why = view.epoch, "all members are to end"
    assert epoch is not None
    reports = {report.member.shard_id: report for report in snapshot.reports}
    for num in range(len(view.leaving), 0, -1):
        going = view.leaving[:num]
        if len(view.leaving) == len(epoch.members):
            break
        try:
            after = leave(epoch, reports, going, rules.demand, snapshot.highest_epoch_number + 1)
        except PlacementError as error:
            why = str(error)
        else:
            num_requests = 0 if after.number == epoch.number else _num_to_hand_over(going, reports, snapshot)
            if num_requests:
                return replace(view, why=f"{num_requests} requests of {', '.join(going)} go over to others")
            return _view_after(view, after, f"{', '.join(going)} leaves")
    return replace(view, why=f"{', '.join(view.leaving)} cannot leave yet: {why}")


def _num_to_hand_over(going: Sequence[str], reports: Mapping[str, Report], snapshot: GroupSnapshot) -> int:
    """Count the sequences on members that leave, while there is time to wait for their routers to move them."""
    statuses = [reports[shard_id].status for shard_id in going
                if snapshot.now_s - snapshot.leaving_since_s.get(shard_id, -HAND_OVER_S) < HAND_OVER_S]
    return sum(status.num_running + status.num_waiting for status in statuses)


def _view_after(running: View, epoch: Epoch, why: str) -> View:
    """Show a running epoch's next state, or another epoch that comes after it."""
    assert running.epoch is not None
    if epoch.number == running.epoch.number:
        return replace(running, epoch=epoch)
    return View(GroupPhase.LOADING, epoch, why, leaving=running.leaving, ended_epoch_number=running.epoch.number)


def _next_epoch(snapshot: GroupSnapshot, members: tuple[Member, ...], ended: str, rules: GroupRules) -> Decision:
    """Decide on an epoch of these members, once their placement is planned."""
    planned = snapshot.planned
    if planned is None or planned.shard_ids != tuple(member.shard_id for member in members):
        return Decision(_waiting(snapshot, f"{ended}the placement is planned"), members, ended)
    if planned.placement is None:
        is_hopeless = len(members) >= rules.num_members         # else more may come
        return Decision(replace(_waiting(snapshot, f"{ended}{planned.why}"), is_too_small=is_hopeless), ended=ended)
    epoch = Epoch(snapshot.highest_epoch_number + 1, members, planned.placement.placement, rendezvous="",
                  shares=planned.placement.shares, figures=planned.placement.figures, changes=planned.changes)
    return Decision(View(GroupPhase.LOADING, epoch, f"{len(members)} members load their weights",
                         ended_epoch_number=snapshot.known_epoch_number))


def _waiting(snapshot: GroupSnapshot, why: str) -> View:
    """Show that no epoch runs: whoever is still in one that the coordinator knows is to leave it."""
    return View(GroupPhase.WAITING, None, why, ended_epoch_number=snapshot.known_epoch_number)


def is_of_unknown_epoch(report: Report, known_epoch_number: int) -> bool:
    """Return whether the shard is in an epoch that another coordinator made: it must tell before a new one is made.

    A newcomer is not asked: to go on with the epoch that it loads for would have those that run the one before wait.
    """
    return (report.status.epoch_number > known_epoch_number and not report.status.is_newcomer
            and report.status.state in (*IN_EPOCH, ShardState.BROKEN))


def runs_unknown(report: Report, known_epoch_number: int, view: View) -> bool:
    """Return whether the shard runs an epoch, or a revision of it, that another coordinator made."""
    if is_of_unknown_epoch(report, known_epoch_number):
        return True
    if view.epoch is None or report.status.epoch_number != view.epoch.number:
        return False
    return report.status.revision > max(view.epoch.revision, view.next.revision if view.next else 0)


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
    if rules.size.is_asleep:
        return "no request came for long, and all shards go"
    reports = {report.member.shard_id: report for report in snapshot.reports}
    for member in epoch.members:
        report = reports.get(member.shard_id)
        if report is None or not _is_present(report, snapshot, rules):
            reason = report.status.detail if report else ""
            return f"shard {member.shard_id} on node {member.node_name} is gone{': ' if reason else ''}{reason}"
        if report.status.epoch_number == epoch.number and report.status.state in HAS_LEFT:
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
    failed = {report.status.detail: report.member.node_name for report in snapshot.reports
              if report.status.state == ShardState.FAILED}
    reasons = "".join(f"; a shard failed on node {node}: {detail}" for detail, node in sorted(failed.items()))
    return f"{who_is_missing([report.member for report in present], rules.size)}{reasons}"
