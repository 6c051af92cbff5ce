"""The plan of a member's memory: where every byte goes, and what fits. Pure, and without SciPy.

Copies are counted in experts of one layer ("slots"): L MoE layers of E experts are L * E slots, one copy each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MemoryDemand:
    """The bytes that the model asks of its members."""

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
        """The bytes of a member that takes requests, before it holds any expert."""
        return self.fixed_bytes_of(takes_requests=True)

    def fixed_bytes_of(self, takes_requests: bool) -> int:
        """Return the bytes of a member before it holds any expert.

        Without requests it needs neither shared weights nor a KV cache.
        """
        return self.buffer_bytes + (self.shared_bytes + self.kv_cache_bytes if takes_requests else 0)


@dataclass(frozen=True, slots=True)
class MemberMemory:
    """One member, in bytes. `resident_bytes`: its process before it loaded anything."""

    node_name: str
    budget_bytes: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The use of one member's bytes. All of them add up to its budget."""

    process_bytes: int
    shared_bytes: int           # weights other than experts
    expert_bytes: int
    kv_cache_bytes: int
    buffer_bytes: int
    free_bytes: int             # of a member without requests: nobody's
    state_bytes: int = 0        # slots for states; 0 without such layers, and in a plan whose caches are not divided

    @property
    def budget_bytes(self) -> int:
        return (self.process_bytes + self.shared_bytes + self.expert_bytes + self.cache_bytes + self.buffer_bytes
                + self.free_bytes)

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of all that sequences own: keys and values, and states."""
        return self.kv_cache_bytes + self.state_bytes


@dataclass(frozen=True, slots=True)
class RunningMembers:
    """Roles and room, by rank, that stay while a group serves: attention weights and KV cache, slots for experts."""

    takes_requests: tuple[bool, ...]
    slots_M: tuple[int, ...]        # expert copies of all layers that a member may hold


def free_bytes(memory: MemberMemory, demand: MemoryDemand, takes_requests: bool = True) -> int:
    """Return what is left for experts; below zero where not even the fixed part fits."""
    return memory.budget_bytes - memory.resident_bytes - demand.fixed_bytes_of(takes_requests)


def max_slots(memory: MemberMemory, demand: MemoryDemand, takes_requests: bool = True, kv_cache_bytes: int = 0) -> int:
    """Return the expert copies that fit, at most one of every expert of every layer.

    `kv_cache_bytes`: keep so much for the KV cache where it is above the demand's least. 0 when nothing fits.
    """
    more_kv = max(0, kv_cache_bytes - demand.kv_cache_bytes) if takes_requests else 0
    left = free_bytes(memory, demand, takes_requests) - more_kv
    return min(max(0, left) // demand.expert_bytes, demand.num_slots) if demand.expert_bytes else demand.num_slots


def memory_use(memory: MemberMemory, demand: MemoryDemand, num_copies: int, takes_requests: bool) -> MemoryUse:
    """Say where every byte goes. A KV cache takes all that experts leave."""
    experts = num_copies * demand.expert_bytes
    left = free_bytes(memory, demand, takes_requests) - experts
    return MemoryUse(
        process_bytes=memory.resident_bytes, shared_bytes=demand.shared_bytes if takes_requests else 0,
        expert_bytes=experts, kv_cache_bytes=demand.kv_cache_bytes + left if takes_requests else 0,
        buffer_bytes=demand.buffer_bytes, free_bytes=0 if takes_requests else left)


def divide_over_layers(num_experts: int, remaining: list[int], num_layers: int) -> list[int]:
    """Return this layer's share of each member, so that what remains divides evenly over the other layers."""
    shares = [left // num_layers for left in remaining]
    by_remainder = sorted(range(len(remaining)), key=lambda rank: (-(remaining[rank] % num_layers), rank))
    for rank in by_remainder[:num_experts - sum(shares)]:
        shares[rank] += 1
    return shares
