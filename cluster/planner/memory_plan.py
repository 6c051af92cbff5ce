"""Where every byte of a member's memory goes, and what fits. Pure.

Copies are counted in experts of one layer ("slots"): L MoE layers of E experts are L * E slots, one copy each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
        """Of a member that takes requests, before it holds any expert."""
        return self.fixed_bytes_of(takes_requests=True)

    def fixed_bytes_of(self, takes_requests: bool) -> int:
        """Before it holds any expert. Without requests a member needs neither shared weights nor a KV cache."""
        return self.buffer_bytes + (self.shared_bytes + self.kv_cache_bytes if takes_requests else 0)


@dataclass(frozen=True, slots=True)
class MemberMemory:
    """One member, in bytes. `resident_bytes`: its process before it loaded anything."""

    node_name: str
    budget_bytes: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Where one member's bytes go. All of them add up to its budget."""

    process_bytes: int
    shared_bytes: int           # weights other than experts
    expert_bytes: int
    kv_cache_bytes: int
    buffer_bytes: int
    free_bytes: int             # of a member without requests: nobody's

    @property
    def budget_bytes(self) -> int:
        return (self.process_bytes + self.shared_bytes + self.expert_bytes + self.kv_cache_bytes + self.buffer_bytes
                + self.free_bytes)


@dataclass(frozen=True, slots=True)
class RunningMembers:
    """What stays while a group serves, by rank: who has attention weights and a KV cache, and the room for experts."""

    takes_requests: tuple[bool, ...]
    slots_M: tuple[int, ...]        # expert copies of all layers that a member may hold


@dataclass(frozen=True, slots=True)
class Shortfall:
    """One member of a group that cannot hold the model. Raising every member's budget by missing_bytes makes it fit."""

    memory: MemberMemory
    free_bytes: int             # for experts; negative when not even the fixed part fits
    missing_bytes: int


def free_bytes(memory: MemberMemory, demand: MemoryDemand, takes_requests: bool = True) -> int:
    """What is left for experts."""
    return memory.budget_bytes - memory.resident_bytes - demand.fixed_bytes_of(takes_requests)


def max_slots(memory: MemberMemory, demand: MemoryDemand, takes_requests: bool = True, kv_cache_bytes: int = 0) -> int:
    """Expert copies that fit, at most one of every expert of every layer.

    `kv_cache_bytes`: keep so much for the KV cache where it is above the demand's least. 0 when nothing fits.
    """
    more_kv = max(0, kv_cache_bytes - demand.kv_cache_bytes) if takes_requests else 0
    left = free_bytes(memory, demand, takes_requests) - more_kv
    return min(_capacities([left], demand)[0], demand.num_slots)


def memory_use(memory: MemberMemory, demand: MemoryDemand, num_copies: int, takes_requests: bool) -> MemoryUse:
    """Byte for byte. A KV cache takes all that experts leave."""
    experts = num_copies * demand.expert_bytes
    left = free_bytes(memory, demand, takes_requests) - experts
    return MemoryUse(
        process_bytes=memory.resident_bytes, shared_bytes=demand.shared_bytes if takes_requests else 0,
        expert_bytes=experts, kv_cache_bytes=demand.kv_cache_bytes + left if takes_requests else 0,
        buffer_bytes=demand.buffer_bytes, free_bytes=0 if takes_requests else left)


def shortfalls(members: tuple[MemberMemory, ...], demand: MemoryDemand, min_copies: int = 1,
               takes_requests: Sequence[bool] | None = None) -> tuple[Shortfall, ...]:
    """Why the members cannot hold the model, member by member; empty when they can. All take requests unless told."""
    roles = takes_requests or (True,) * len(members)
    free = [free_bytes(memory, demand, takes) for memory, takes in zip(members, roles, strict=True)]
    capacities = [min(capacity, demand.num_slots) for capacity in _capacities(free, demand)]
    lacking_slots = max(0, demand.num_slots * min_copies - sum(capacities))
    if min(free) >= 0 and not lacking_slots:
        return ()
    each = -(-lacking_slots // len(members)) * demand.expert_bytes
    return tuple(Shortfall(memory, left, each + max(0, -left)) for memory, left in zip(members, free, strict=True))


def _capacities(free: list[int], demand: MemoryDemand) -> list[int]:
    return [max(0, left) // demand.expert_bytes if demand.expert_bytes else demand.num_slots for left in free]


def divide_over_layers(num_experts: int, remaining: list[int], num_layers: int) -> list[int]:
    """This layer's share of each member, so that what remains divides evenly over the other layers."""
    shares = [left // num_layers for left in remaining]
    by_remainder = sorted(range(len(remaining)), key=lambda rank: (-(remaining[rank] % num_layers), rank))
    for rank in by_remainder[:num_experts - sum(shares)]:
        shares[rank] += 1
    return shares
