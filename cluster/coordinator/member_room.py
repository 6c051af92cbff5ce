"""The room for experts that members have beside what they hold. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.coordinator.membership import Report
from cluster.planner.memory_plan import MemoryDemand
from serving.link.epoch import Epoch


def room_bytes(report: Report, demand: MemoryDemand) -> int:
    """Return the bytes that new experts may take beside the old ones.

    An accelerator does not report what it uses: it changes one layer at a time, as with no room.
    """
    facts = report.member.facts
    if facts.device != "cpu":
        return 0
    return max(0, facts.memory_budget_bytes - report.status.resident_bytes - demand.buffer_bytes)


def reachable_slots(epoch: Epoch, reports: Mapping[str, Report], demand: MemoryDemand) -> tuple[int, ...]:
    """Return the copies that each member can come to hold, by rank: its own, and what fits beside a layer in change."""
    placement, slots = epoch.placement, []
    for rank, member in enumerate(epoch.members):
        largest = max((len(placement.experts_of(layer, rank)) for layer in range(placement.num_layers)), default=0)
        report = reports.get(member.shard_id)
        free_bytes = (room_bytes(report, demand) if report else 0) - largest * demand.expert_bytes
        slots.append(placement.num_experts_of(rank) + max(0, free_bytes) // max(1, demand.expert_bytes))
    return tuple(slots)
