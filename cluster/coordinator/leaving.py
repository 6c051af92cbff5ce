"""Members that are told to leave: who is meant, whether the others can do without, and how far it is. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.coordinator.member_room import memory_of
from cluster.coordinator.reports import Report
from cluster.coordinator.view import LeaveOrder, View
from cluster.planner.layer.error import PlacementError
from cluster.planner.memory_fit import does_not_fit, members_fit
from cluster.planner.plan_rules import PlanRules
from serving.link.epoch import Epoch, Member

_IS_DONE = "may be stopped: the group goes on without it"


@dataclass(frozen=True, slots=True)
class Drain:
    """Tells how far it is that some members leave. They get no new requests from its beginning on."""

    operation_id: str               # of its LeaveOrder, as the next two
    target: str
    shard_ids: tuple[str, ...]
    is_done: bool                   # the group goes on without them: they may be stopped
    num_experts: int                # copies that only they hold
    num_requests: int               # that run or wait on them
    detail: str                     # what goes on, or why it does not


def find_leaving(target: str, members: Iterable[Member]) -> tuple[str, ...]:
    """Return the shards of that name or on that node. Raises PlacementError for a name that is not known."""
    known = sorted(members, key=lambda member: member.shard_id)
    found = tuple(member.shard_id for member in known if target in (member.shard_id, member.node_name, member.node_id))
    if not found:
        names = "; ".join(f"shard {member.shard_id} on node {member.node_name}" for member in known) or "none"
        raise PlacementError(f"there is no shard or node {target!r}", fix=f"name one of those that are here: {names}")
    return found


def check_others_suffice(epoch: Epoch, leaving: Collection[str], rules: PlanRules) -> None:
    """Raise PlacementError when the others of the epoch cannot hold the model, with the bytes that are missing."""
    others = [member for member in epoch.members if member.shard_id not in leaving]
    if not others:
        raise PlacementError("nobody would be left in the group", fix="add members first, or stop the service")
    fit = members_fit([memory_of(member) for member in others], rules)
    if not fit.is_enough:
        raise does_not_fit(fit)


def slots_without(epoch: Epoch, leaving: Collection[str], slots: Sequence[int]) -> tuple[int, ...]:
    """Return the expert copies that each member may hold when some are to hold none."""
    return tuple(0 if member.shard_id in leaving else one for member, one in zip(epoch.members, slots, strict=True))


def progress(order: LeaveOrder, view: View, reports: Mapping[str, Report]) -> Drain:
    """Return how far it is by now."""
    leaving, epoch = set(order.shard_ids), view.epoch
    ranks = {rank for rank, member in enumerate(epoch.members) if member.shard_id in leaving} if epoch else set()
    num_experts = sum(layer.count(holders) for layer in (epoch.placement.holders if epoch else ())
                      for holders in set(layer) if set(holders) <= ranks)
    statuses = [reports[shard_id].status for shard_id in leaving if shard_id in reports]
    num_requests = sum(status.num_running + status.num_waiting for status in statuses)
    is_done = not ranks and not num_requests
    return Drain(order.operation_id, order.target, order.shard_ids, is_done, num_experts, num_requests,
                 _IS_DONE if is_done else _what_is_left(view, num_experts, num_requests))


def _what_is_left(view: View, num_experts: int, num_requests: int) -> str:
    parts = [*([f"{num_experts} experts move to others"] if num_experts else []),
             *([f"{num_requests} requests go on there"] if num_requests else []), *([view.why] if view.why else [])]
    return "; ".join(parts) or "the next epoch begins without it"
