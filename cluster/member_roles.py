"""Which members take requests, which hold experts, and how many slots their memory gives. Pure.

Attention and experts are done one after the other, so the roles compete for memory alone: a member without requests has
no shared weights and no KV cache, and room for more experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.device_curves import FloatArray
from cluster.exchange_cost import exchange_seconds
from cluster.layer_model import everything_open
from cluster.layer_problem import LayerProblem
from cluster.memory_plan import MemberMemory, MemoryDemand, free_bytes, max_slots, shortfalls
from cluster.placement_error import PlacementError
from cluster.request_shares import share_rows
from cluster.step_costs import StepCosts
from model.memory import kv_block_bytes

KV_PARTS = (1.0, 0.75, 0.5, 0.25, 0.0)      # of the KV cache that the workload asks for: the most that leaves room
WORTH_A_ROLE = 0.998        # another role must make the step this much shorter
WORTH_A_MEMBER = 1.001      # a member without which the step is no longer than this is left out


@dataclass(frozen=True, slots=True)
class Roles:
    """Of every member, by rank."""

    takes_requests: tuple[bool, ...]
    holds_experts: tuple[bool, ...]

    def without_requests(self, rank: int) -> Roles:
        return replace(self, takes_requests=_off(self.takes_requests, rank))

    def without_anything(self, rank: int) -> Roles:
        return Roles(_off(self.takes_requests, rank), _off(self.holds_experts, rank))


def _off(flags: tuple[bool, ...], rank: int) -> tuple[bool, ...]:
    return flags[:rank] + (False,) + flags[rank + 1:]


@dataclass(frozen=True, slots=True)
class RoleFit:
    """What members have room for in their roles."""

    roles: Roles
    kv_part: float                  # of the KV cache that the workload asks for, kept free
    slots_M: tuple[int, ...]        # expert copies of all layers
    rows_M: FloatArray
    own_rows_s: float               # of the slowest member for its own rows of a step
    kv_rows: float                  # that the KV caches hold together when all slots are used


@dataclass(frozen=True, slots=True)
class MemoryPlanner:
    """Which roles fit into the members' memories."""

    costs: StepCosts
    demand: MemoryDemand
    memories: tuple[MemberMemory, ...]
    min_copies: int

    @property
    def num_wanted(self) -> int:
        return self.demand.num_slots * self.min_copies

    def kv_row_bytes(self) -> int:
        """Of one row: the keys and values of its context."""
        args = self.costs.args
        dtype_bytes = self.costs.row_bytes // args.hidden_size
        return self.costs.workload.context_tokens * kv_block_bytes(args, 1, dtype_bytes)

    def steps_for_all_rows(self, kv_rows: float) -> float:
        """How many steps the rows take when the KV caches hold so many of them; 1 when they hold them all."""
        return max(1.0, 0.999 * self.costs.workload.num_rows / max(kv_rows, 1e-9))

    def max_rows(self, takes_requests: Sequence[bool], num_copies: Sequence[int]) -> list[float]:
        """What each member's KV cache holds beside its experts."""
        left = [free_bytes(memory, self.demand) + self.demand.kv_cache_bytes - copies * self.demand.expert_bytes
                for memory, copies in zip(self.memories, num_copies, strict=True)]
        per_row = self.kv_row_bytes() or 1e-9
        return [max(0, one) / per_row if takes else 0.0 for one, takes in zip(left, takes_requests, strict=True)]

    def fit(self, roles: Roles) -> RoleFit | None:
        """With the largest of KV_PARTS that leaves room for the experts; None when none does."""
        if not any(roles.takes_requests):
            return None
        wanted_M, _ = share_rows(self.costs, roles.takes_requests,
                                 self.max_rows(roles.takes_requests, [0] * len(self.memories)))
        for kv_part in KV_PARTS:
            kv_M = kv_part * wanted_M * self.kv_row_bytes()
            slots_M = tuple(max_slots(memory, self.demand, roles.takes_requests[rank], int(kv_M[rank]))
                            if roles.holds_experts[rank] else 0 for rank, memory in enumerate(self.memories))
            if sum(slots_M) >= self.num_wanted:
                max_rows_M = self.max_rows(roles.takes_requests, slots_M)
                rows_M, own_rows_s = share_rows(self.costs, roles.takes_requests, max_rows_M)
                return RoleFit(roles, kv_part, slots_M, rows_M, own_rows_s, sum(max_rows_M))
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


def choose_roles(planner: MemoryPlanner) -> RoleFit:
    """Start with everything that fits, then take away what makes the predicted step longer, the worst first.

    With few rows the fastest members may be better without the exchange with others, so the start is also tried with
    the fastest one alone, the fastest two, and so on.
    """
    probability_E = mean_probability(planner.costs)
    everything = _roles_that_fit(planner)
    fit, estimate_s = everything, estimate_step(planner, everything, probability_E)
    for roles in _fastest_alone(planner.costs, everything.roles, probability_E):
        fit, estimate_s = _if_better(planner, (fit, estimate_s), [(roles, WORTH_A_MEMBER)], probability_E)
    while True:
        before = fit
        fit, estimate_s = _if_better(planner, (fit, estimate_s), list(_fewer(planner, fit.roles)), probability_E)
        if fit is before:
            return fit


def _if_better(planner: MemoryPlanner, now: tuple[RoleFit, float], options: list[tuple[Roles, float]],
               probability_E: FloatArray) -> tuple[RoleFit, float]:
    """The best of the options that stay under their part of the time of now; now when none does."""
    best = now
    for roles, limit in options:
        fit = planner.fit(roles)
        if fit is not None:
            seconds = estimate_step(planner, fit, probability_E)
            if seconds <= (now[1] * limit if best is now else best[1]):
                best = (fit, seconds)
    return best


def slowest_first(costs: StepCosts, probability_E: FloatArray) -> list[int]:
    """Ranks by what an equal part of the work takes."""
    rows = costs.workload.num_rows / len(costs.profiles)
    seconds = [costs.args.num_moe_layers * costs.own_experts_s(rank, rows, probability_E) + costs.own_rows_s(rank, rows)
               for rank in range(len(costs.profiles))]
    return sorted(range(len(seconds)), key=lambda rank: (-seconds[rank], -rank))


def _fastest_alone(costs: StepCosts, roles: Roles, probability_E: FloatArray) -> Iterator[Roles]:
    """The roles of the fastest members alone, from all but one down to one."""
    for rank in slowest_first(costs, probability_E)[:-1]:
        roles = roles.without_anything(rank)
        yield roles


def _fewer(planner: MemoryPlanner, roles: Roles) -> Iterator[tuple[Roles, float]]:
    """Roles with one thing less, each with the part of the time that it must stay under. Of members alike only one."""
    seen: set[object] = set()
    for rank, (takes, holds) in enumerate(zip(roles.takes_requests, roles.holds_experts, strict=True)):
        memory = planner.memories[rank]
        kind = (planner.costs.profiles[rank], memory.budget_bytes, memory.resident_bytes, takes, holds)
        if kind in seen:
            continue
        seen.add(kind)
        if takes and holds:
            yield roles.without_requests(rank), WORTH_A_ROLE
        if takes or holds:
            yield roles.without_anything(rank), WORTH_A_MEMBER


def _roles_that_fit(planner: MemoryPlanner) -> RoleFit:
    takes = tuple(free_bytes(memory, planner.demand) >= 0 for memory in planner.memories)
    holds = tuple(free_bytes(memory, planner.demand, takes_requests=False) >= 0 for memory in planner.memories)
    if any(takes):
        rows_M, _ = share_rows(planner.costs, takes)
        takes = tuple(bool(rows > 0) for rows in rows_M)
    roles = Roles(takes, holds)
    even = planner.costs.workload.num_rows / len(planner.memories)
    while (fit := planner.fit(roles)) is None:
        takers = [rank for rank, one in enumerate(roles.takes_requests) if one]
        if len(takers) < 2:
            raise does_not_fit(planner, roles)
        roles = roles.without_requests(max(takers, key=lambda rank: planner.costs.own_rows_s(rank, even)))
    return fit


def does_not_fit(planner: MemoryPlanner, roles: Roles) -> PlacementError:
    takes = roles.takes_requests if any(roles.takes_requests) else (True,) * len(planner.memories)
    lacking, demand = shortfalls(planner.memories, demand=planner.demand, min_copies=planner.min_copies,
                                 takes_requests=takes), planner.demand
    total = sum(entry.missing_bytes for entry in lacking)
    experts = planner.num_wanted * demand.expert_bytes
    lines = [f"the {len(lacking)} members cannot hold the model: {total} bytes are missing"]
    for entry, takes_requests in zip(lacking, takes, strict=True):
        memory = entry.memory
        shared = f" - shared weights {demand.shared_bytes} - KV cache {demand.kv_cache_bytes}" if takes_requests else ""
        lines.append(f"member {memory.node_name}: {entry.missing_bytes} bytes missing (budget {memory.budget_bytes} - "
                     f"process {memory.resident_bytes}{shared} - buffers {demand.buffer_bytes} = {entry.free_bytes} "
                     f"for experts, which take {experts} in all)")
    copies = ", set min_copies to 1" if planner.min_copies > 1 else ""
    return PlacementError("\n".join(lines), fix="raise the members' memory budgets by what they miss, add members with "
                          f"{total} bytes free for experts{copies}, or lower the KV cache and max_batch_tokens")


def mean_probability(costs: StepCosts) -> FloatArray:
    """Of a layer like the others: its experts' chances from the hottest to the coldest, on average."""
    load = costs.workload.expert_load
    layers = range(costs.args.num_moe_layers) if load else range(1)
    mean_E: FloatArray = np.mean([np.sort(costs.probability(layer))[::-1] for layer in layers], axis=0)
    return mean_E


def estimate_step(planner: MemoryPlanner, fit: RoleFit, probability_E: FloatArray) -> float:
    """Seconds of a step whose layers all are like the given one, with copies in fractions.

    Where the KV caches hold only a part of the rows, the rows take so many more steps.
    """
    costs, num_layers = planner.costs, planner.costs.args.num_moe_layers
    slots = slots_of_layers(fit.slots_M, num_layers)[-1]
    relaxed = everything_open(LayerProblem(costs.expert_costs(probability_E), slots, planner.min_copies)).relaxed()
    assert relaxed is not None, "LayerProblem checks that there is room"
    exchange_M = exchange_seconds(costs.profiles, fit.rows_M, probability_E, relaxed.rows_EM, costs.row_bytes)
    step_s = fit.own_rows_s + num_layers * (relaxed.step_s + float(exchange_M.max()))
    return step_s * planner.steps_for_all_rows(fit.kv_rows)
