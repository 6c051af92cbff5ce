"""A member leaves on purpose: what only it holds is given to others first, while it serves. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.coordinator.member_room import reachable_slots
from cluster.coordinator.placement_change import begin, find
from cluster.coordinator.regroup import Remains, regroup
from cluster.coordinator.reports import Report
from cluster.planner.layer.error import PlacementError
from cluster.planner.memory_plan import MemoryDemand
from cluster.planner.placement_without import Room, placement_without
from model.placement import Placement
from serving.link.epoch import Epoch, PlannedPlacement


def leavers(epoch: Epoch | None, reports: Sequence[Report]) -> tuple[str, ...]:
    """Return the shard ids of the members that are to go, by rank."""
    told = {report.member.shard_id for report in reports if report.status.is_leaving}
    return tuple(member.shard_id for member in epoch.members if member.shard_id in told) if epoch else ()


def leave(epoch: Epoch, reports: Mapping[str, Report], leaving: Sequence[str], demand: MemoryDemand,
          number: int) -> Epoch:
    """Return how the group comes nearer to go on without `leaving`: the running epoch with a change of placement begun
    after which nobody needs them, or the epoch `number` without them.

    Where the experts do not fit beside what runs, or could not be brought there, the next epoch loads them and its KV
    caches give way: that is waited for. Raises PlacementError when those who stay cannot hold the model.
    """
    staying = {rank: reports[member.shard_id] for rank, member in enumerate(epoch.members)
               if member.shard_id not in leaving}
    operation_id = leave_id(epoch, leaving)
    if _lacks(epoch.placement, staying) and find(epoch, operation_id) is None:
        target = _evacuated(epoch, reports, staying, demand)
        if target is not None:
            return begin(epoch, operation_id, f"{', '.join(leaving)} leaves", target, demand.expert_bytes)
    return regroup(epoch, Remains(staying, {}), demand, number)


def leave_id(epoch: Epoch, leaving: Sequence[str]) -> str:
    """Return the name of the change of placement before those leave."""
    return f"leave-{epoch.number}-{'-'.join(leaving)}"


def _lacks(placement: Placement, staying: Mapping[int, Report]) -> bool:
    """Return whether an expert is held by nobody who stays."""
    return any(not any(rank in staying for rank in ranks) for layer in placement.holders for ranks in layer)


def _evacuated(epoch: Epoch, reports: Mapping[str, Report], staying: Mapping[int, Report],
               demand: MemoryDemand) -> PlannedPlacement | None:
    """Return the placement in which those who stay hold all experts, and the others what they have; None where there is
    no room for that beside what runs."""
    slots_M, placement = reachable_slots(epoch, reports, demand), epoch.placement
    room = Room(tuple((slots_M[rank] - placement.num_experts_of(rank)) * demand.expert_bytes for rank in staying),
                demand.expert_bytes)
    try:
        planned = placement_without(epoch, set(range(len(epoch.members))) - set(staying), room)
    except PlacementError:
        return None
    old_rank = list(staying)

    def ranks_of(had: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted((*(rank for rank in had if rank not in staying), *(old_rank[rank] for rank in new))))
    holders = tuple(tuple(map(ranks_of, layer, layer_new))
                    for layer, layer_new in zip(placement.holders, planned.placement.holders, strict=True))
    return PlannedPlacement(replace(placement, holders=holders), epoch.shares)
