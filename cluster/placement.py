"""Which members hold which experts, by free memory. Pure.

Copies are counted in experts of one layer ("slots"): L MoE layers of E experts are L * E slots, one copy each.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.placement import Placement


@dataclass(frozen=True, slots=True)
class MemoryDemand:
    """What the model asks of its members, in bytes."""

    num_moe_layers: int
    num_experts: int            # of each MoE layer
    expert_bytes: int           # one expert of one layer
    shared_bytes: int           # weights that every member holds
    kv_cache_bytes: int         # the least that a member must be able to give its KV cache
    buffer_bytes: int           # activations, communication and what loading needs for a moment

    @property
    def num_slots(self) -> int:
        return self.num_moe_layers * self.num_experts

    @property
    def fixed_bytes(self) -> int:
        """Of every member, before it holds any expert."""
        return self.shared_bytes + self.kv_cache_bytes + self.buffer_bytes


@dataclass(frozen=True, slots=True)
class MemberMemory:
    """One member, in bytes. `resident_bytes`: its process before it loaded anything."""

    node_name: str
    budget_bytes: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Shortfall:
    """One member of a group that cannot hold the model. Raising every member's budget by missing_bytes makes it fit."""

    memory: MemberMemory
    free_bytes: int             # for experts; negative when not even the fixed part fits
    missing_bytes: int


def free_bytes(memory: MemberMemory, demand: MemoryDemand) -> int:
    """What is left for experts."""
    return memory.budget_bytes - memory.resident_bytes - demand.fixed_bytes


def place_by_free_memory(members: tuple[MemberMemory, ...], demand: MemoryDemand) -> Placement | None:
    """One copy of every expert, in proportion to the memory left for experts. None when they do not fit."""
    free = [free_bytes(memory, demand) for memory in members]
    if min(free) < 0 or sum(_capacities(free, demand)) < demand.num_slots:
        return None
    remaining = _slots_of_member(free, demand)
    layers = []
    for layer in range(demand.num_moe_layers):
        shares = _divide(demand.num_experts, remaining, demand.num_moe_layers - layer)
        remaining = [left - share for left, share in zip(remaining, shares, strict=True)]
        layers.append(tuple((rank,) for rank, share in enumerate(shares) for _ in range(share)))
    return Placement(num_members=len(members), holders=tuple(layers))


def shortfalls(members: tuple[MemberMemory, ...], demand: MemoryDemand) -> tuple[Shortfall, ...]:
    """Why the members cannot hold the model, member by member; empty when they can."""
    free = [free_bytes(memory, demand) for memory in members]
    lacking_slots = max(0, demand.num_slots - sum(_capacities(free, demand)))
    if min(free) >= 0 and not lacking_slots:
        return ()
    each = -(-lacking_slots // len(members)) * demand.expert_bytes
    return tuple(Shortfall(memory, left, each + max(0, -left)) for memory, left in zip(members, free, strict=True))


def _capacities(free: list[int], demand: MemoryDemand) -> list[int]:
    return [max(0, left) // demand.expert_bytes if demand.expert_bytes else demand.num_slots for left in free]


def _slots_of_member(free: list[int], demand: MemoryDemand) -> list[int]:
    """Slots in proportion to free memory, by largest remainder, never above what a member can hold."""
    total = sum(free)
    if not total:
        return [demand.num_slots] + [0] * (len(free) - 1)       # experts of zero bytes, or none at all
    slots = [demand.num_slots * left // total for left in free]
    capacities = _capacities(free, demand)
    by_remainder = sorted(range(len(free)), key=lambda rank: (-(demand.num_slots * free[rank] % total), rank))
    lacking = demand.num_slots - sum(slots)
    while lacking:
        for rank in by_remainder:
            if lacking and slots[rank] < capacities[rank]:
                slots[rank] += 1
                lacking -= 1
    return slots


def _divide(num_experts: int, remaining: list[int], num_layers: int) -> list[int]:
    """This layer's share of each member, so that what remains divides evenly over the other layers."""
    shares = [left // num_layers for left in remaining]
    by_remainder = sorted(range(len(remaining)), key=lambda rank: (-(remaining[rank] % num_layers), rank))
    for rank in by_remainder[:num_experts - sum(shares)]:
        shares[rank] += 1
    return shares
