"""The roles of members, and the slots that their memory gives them in these roles. Pure.

Attention and experts are done one after the other, so the roles compete for memory alone: a member without requests has
no shared weights and no KV cache, and room for more experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.planner.costs.step_costs import StepCosts
from cluster.planner.memory_demand import sequence_bytes
from cluster.planner.memory_plan import MemberMemory, MemoryDemand, free_bytes, max_slots
from cluster.planner.request_shares import share_rows

WORTH_A_ROLE_CHANGE = 1.1   # a step that is so many times as long is better than to reload a member in another role
KV_PARTS = (1.0, 0.75, 0.5, 0.25, 0.0)      # of the KV cache that the workload asks for: the most that leaves room


@dataclass(frozen=True, slots=True)
class Roles:
    """The roles of every member, by rank."""

    takes_requests: tuple[bool, ...]
    holds_experts: tuple[bool, ...]

    def without_requests(self, rank: int) -> Roles:
        return replace(self, takes_requests=_off(self.takes_requests, rank))

    def without_anything(self, rank: int) -> Roles:
        return Roles(_off(self.takes_requests, rank), _off(self.holds_experts, rank))

    def with_kept(self, kept_roles: Sequence[bool | None]) -> Roles:
        """Return the roles where who runs takes requests as before; None: does not run yet."""
        return self if not kept_roles else replace(self, takes_requests=tuple(
            takes if kept is None else kept for takes, kept in zip(self.takes_requests, kept_roles, strict=True)))


def _off(flags: tuple[bool, ...], rank: int) -> tuple[bool, ...]:
    return flags[:rank] + (False,) + flags[rank + 1:]


@dataclass(frozen=True, slots=True)
class RoleFit:
    """The room of members in their roles."""

    roles: Roles
    kv_part: float                  # of the KV cache that the workload asks for, kept free
    slots_M: tuple[int, ...]        # expert copies of all layers


@dataclass(frozen=True, slots=True)
class MemoryPlanner:
    """Finds which roles fit into the members' memories."""

    costs: StepCosts
    demand: MemoryDemand
    memories: tuple[MemberMemory, ...]
    min_copies: int
    kept_roles: tuple[bool | None, ...] = ()    # who takes requests already; None: does not run yet; (): nobody runs

    def role_penalty(self, takes_requests: Sequence[bool]) -> float:
        """Return by what to multiply the time of a step with these roles: a running member in a new one reloads."""
        changes = (kept is not None and kept != takes
                   for kept, takes in zip(self.kept_roles, takes_requests, strict=bool(self.kept_roles)))
        return WORTH_A_ROLE_CHANGE if any(changes) else 1.0

    @property
    def num_wanted(self) -> int:
        return self.demand.num_slots * self.min_copies

    def kv_row_bytes(self) -> int:
        """Return the bytes of one row: the keys and values of its context, and its states."""
        return sequence_bytes(self.costs.args, self.costs.workload.context_tokens, self.costs.dtype_bytes)

    def steps_for_all_rows(self, kv_rows: float) -> float:
        """Return how many steps the rows take when the KV caches hold so many of them; 1 when they hold them all."""
        return max(1.0, 0.999 * self.costs.workload.num_rows / max(kv_rows, 1e-9))

    def max_rows(self, takes_requests: Sequence[bool], num_copies: Sequence[int]) -> list[float]:
        """Return the rows that each member's KV cache holds beside its experts."""
        left = [free_bytes(memory, self.demand) + self.demand.kv_cache_bytes - copies * self.demand.expert_bytes
                for memory, copies in zip(self.memories, num_copies, strict=True)]
        per_row = self.kv_row_bytes() or 1e-9
        return [max(0, one) / per_row if takes else 0.0 for one, takes in zip(left, takes_requests, strict=True)]

    def fit(self, roles: Roles) -> RoleFit | None:
        """Find the slots with the largest of KV_PARTS that leaves room for the experts. None: none does.

        Kept roles stay.
        """
        roles = roles.with_kept(self.kept_roles)
        if not any(roles.takes_requests):
            return None
        wanted_M, _ = share_rows(self.costs, roles.takes_requests,
                                 self.max_rows(roles.takes_requests, [0] * len(self.memories)))
        for kv_part in KV_PARTS:
            kv_M = kv_part * wanted_M * self.kv_row_bytes()
            slots_M = tuple(max_slots(memory, self.demand, roles.takes_requests[rank], int(kv_M[rank]))
                            if roles.holds_experts[rank] else 0 for rank, memory in enumerate(self.memories))
            if sum(slots_M) >= self.num_wanted:
                return RoleFit(roles, kv_part, slots_M)
        return None


def slots_of_layers(slots_M: Sequence[int], num_layers: int) -> list[tuple[int, ...]]:
    """Divide each member's slots over the layers. What does not divide goes round, so that layers' sums stay alike."""
    layers = [[slots // num_layers for slots in slots_M] for _ in range(num_layers)]
    position = 0
    for rank, slots in enumerate(slots_M):
        for _ in range(slots % num_layers):
            layers[position % num_layers][rank] += 1
            position += 1
    return [tuple(layer) for layer in layers]
