"""The room for experts that members have beside what they hold. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.coordinator.reports import Report
from cluster.planner.memory_demand import PROCESS_GROWTH_BYTES
from cluster.planner.memory_plan import MemberMemory, MemoryDemand, free_bytes
from serving.link.epoch import Epoch, Member


def memory_of(member: Member) -> MemberMemory:
    facts = member.facts
    return MemberMemory(member.node_name, facts.memory_budget_bytes, facts.resident_bytes)


def room_bytes(report: Report, demand: MemoryDemand) -> int:
    """Return the bytes that new experts may take beside the old ones.

    An accelerator does not report what it uses: it changes one layer at a time, as with no room.
    """
    facts = report.member.facts
    if facts.device != "cpu":
        return 0
    return max(0, facts.memory_budget_bytes - report.status.resident_bytes - demand.buffer_bytes)


def regroup_room_bytes(report: Report, epoch: Epoch, rank: int, demand: MemoryDemand) -> int:
    """Return the bytes that more experts may take on a member that goes on when others of its epoch are gone.

    It keeps its role and its experts. Its KV cache gives way down to the plan's least: below that the plan of a new
    group would not go either, and a sequence of moderate length could wait for ever. Below zero: it has too little now.
    """
    facts, status, takes_requests = report.member.facts, report.status, epoch.takes_requests(rank)
    memory = memory_of(report.member)
    held_bytes = epoch.placement.num_experts_of(rank) * demand.expert_bytes
    planned = free_bytes(memory, demand, takes_requests) - held_bytes
    if facts.device != "cpu" or not status.resident_bytes:
        return planned
    # Measured, for a process that grew by more than its plan allows. Pages of a cache that were never used do not count
    # there, so it may say more than the plan.
    least_cache_bytes = demand.kv_cache_bytes if takes_requests else 0
    measured = (facts.memory_budget_bytes - status.resident_bytes - demand.buffer_bytes + PROCESS_GROWTH_BYTES
                + status.kv_cache_bytes - least_cache_bytes)
    return min(planned, measured)


def reachable_slots(epoch: Epoch, reports: Mapping[str, Report], demand: MemoryDemand) -> tuple[int, ...]:
    """Return the copies that each member can come to hold, by rank: its own, and what fits beside a layer in change."""
    placement, slots = epoch.placement, []
    for rank, member in enumerate(epoch.members):
        largest = max((len(placement.experts_of(layer, rank)) for layer in range(placement.num_layers)), default=0)
        report = reports.get(member.shard_id)
        left_bytes = (room_bytes(report, demand) if report else 0) - largest * demand.expert_bytes
        slots.append(placement.num_experts_of(rank) + max(0, left_bytes) // max(1, demand.expert_bytes))
    return tuple(slots)
