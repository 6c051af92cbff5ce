"""Which members take requests, which hold experts, and how many slots their memory gives. Pure.

Attention and experts are done one after the other, so the roles compete for memory alone: a member without requests has
no shared weights and no KV cache, and room for more experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.planner.cache_plan import sequence_bytes
from cluster.planner.exchange_cost import exchange_seconds
from cluster.planner.layer.arrays import FloatArray
from cluster.planner.layer.error import PlacementError
from cluster.planner.layer.linear_program import everything_open
from cluster.planner.layer.problem import LayerProblem
from cluster.planner.memory_plan import MemberMemory, MemoryDemand, free_bytes, max_slots, shortfalls
from cluster.planner.request_shares import share_rows
from cluster.planner.step_costs import StepCosts

KV_PARTS = (1.0, 0.75, 0.5, 0.25, 0.0)      # of the KV cache that the workload asks for: the most that leaves room
MAX_CHOICES = 64            # of members, that are all tried
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
        """Of one row: the keys and values of its context, and its state."""
        args = self.costs.args
        dtype_bytes = self.costs.row_bytes // args.hidden_size
        return sequence_bytes(args, self.costs.workload.context_tokens, dtype_bytes)

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


def choose_roles(planner: MemoryPlanner) -> RoleFit:
    """Start with everything that fits, then take away what makes the predicted step longer, the worst first.

    An exchange costs whoever takes part in it, so several may have to leave before any of it is saved: the start is
    also tried with some members alone.
    """
    probability_E = mean_probability(planner.costs)
    ranks = range(len(planner.memories))
    fit = _first_fit(planner, ranks)
    if fit is None:
        raise does_not_fit(planner, _one_taker(_first_roles(planner, ranks)))
    now = (fit, estimate_step(planner, fit, probability_E))
    starts = (_first_fit(planner, some) for some in _some_members(planner, probability_E))
    now = _best_of(planner, now, [(one, 1.0) for one in starts if one is not None], probability_E)
    while True:
        fewer = ((planner.fit(roles), limit) for roles, limit in _fewer(planner, now[0].roles))
        better = _best_of(planner, now, [(one, limit) for one, limit in fewer if one is not None], probability_E)
        if better is now:
            return now[0]
        now = better


def _best_of(planner: MemoryPlanner, now: tuple[RoleFit, float], options: list[tuple[RoleFit, float]],
             probability_E: FloatArray) -> tuple[RoleFit, float]:
    """The best of the options that stay under their part of the time of now; now when none does."""
    best = now
    for fit, limit in options:
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


def _some_members(planner: MemoryPlanner, probability_E: FloatArray) -> Iterator[list[int]]:
    """Ranks of a part of the members: every choice when they are few, else the fastest ones."""
    kinds: dict[object, list[int]] = {}
    for rank, memory in enumerate(planner.memories):
        kind = (planner.costs.profiles[rank], memory.budget_bytes, memory.resident_bytes)
        kinds.setdefault(kind, []).append(rank)
    if math.prod(len(ranks) + 1 for ranks in kinds.values()) <= MAX_CHOICES:
        for counts in itertools.product(*(range(len(ranks) + 1) for ranks in kinds.values())):
            some = [rank for count, ranks in zip(counts, kinds.values(), strict=True) for rank in ranks[:count]]
            if 0 < len(some) < len(planner.memories):
                yield some
    else:
        fastest = slowest_first(planner.costs, probability_E)[::-1]
        yield from (fastest[:count] for count in range(1, len(fastest)))


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


def _first_roles(planner: MemoryPlanner, ranks: Sequence[int]) -> Roles:
    """Of these members alone: all that their memory allows, and requests where they do not slow the others."""
    demand, everybody = planner.demand, range(len(planner.memories))
    takes = [rank in ranks and free_bytes(planner.memories[rank], demand) >= 0 for rank in everybody]
    holds = [rank in ranks and free_bytes(planner.memories[rank], demand, False) >= 0 for rank in everybody]
    if any(takes):
        rows_M, _ = share_rows(planner.costs, takes)
        takes = [bool(rows > 0) for rows in rows_M]
    return Roles(tuple(takes), tuple(holds))


def _first_fit(planner: MemoryPlanner, ranks: Sequence[int]) -> RoleFit | None:
    """These members alone. While the experts do not fit, the slowest one's requests are given up. None: never."""
    first = roles = _first_roles(planner, ranks)
    rows = planner.costs.workload.num_rows / len(ranks)
    while (fit := planner.fit(roles)) is None:
        takers = [rank for rank, takes in enumerate(roles.takes_requests) if takes]
        if len(takers) < 2:
            return next((fit for one in _one_taker(first) if (fit := planner.fit(one)) is not None), None)
        roles = roles.without_requests(max(takers, key=lambda rank: planner.costs.own_rows_s(rank, rows)))
    return fit


def _one_taker(roles: Roles) -> list[Roles]:
    """Each of those that take requests, as the only one."""
    everybody = range(len(roles.takes_requests))
    return [Roles(tuple(rank == taker for rank in everybody), roles.holds_experts)
            for taker in everybody if roles.takes_requests[taker]]


def does_not_fit(planner: MemoryPlanner, options: Sequence[Roles]) -> PlacementError:
    """What is missing in those of the roles that miss least; without options, when all members take requests."""
    demand = planner.demand
    choices = [roles.takes_requests for roles in options] or [(True,) * len(planner.memories)]
    lacking, takes = min(
        ((shortfalls(planner.memories, demand, planner.min_copies, takes), takes) for takes in choices),
        key=lambda choice: sum(entry.missing_bytes for entry in choice[0]))
    total = sum(entry.missing_bytes for entry in lacking)
    experts = planner.num_wanted * demand.expert_bytes
    lines = [f"the {len(lacking)} members cannot hold the model: {total} bytes are missing"]
    for entry, has_attention in zip(lacking, takes, strict=True):
        memory = entry.memory
        shared = f" - shared weights {demand.shared_bytes} - KV cache {demand.kv_cache_bytes}" if has_attention else ""
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
    takes, num_copies_M = fit.roles.takes_requests, np.minimum(
        np.ceil(num_layers * relaxed.copies_EM.sum(axis=0)), fit.slots_M)
    max_rows_M = planner.max_rows(takes, num_copies_M.astype(np.int64).tolist())
    rows_M, own_rows_s = share_rows(costs, takes, max_rows_M)
    exchange_M = exchange_seconds(costs.profiles, rows_M, probability_E, relaxed.fraction_EM, costs.row_bytes)
    step_s = own_rows_s + num_layers * (relaxed.step_s + float(exchange_M.max()))
    return step_s * planner.steps_for_all_rows(sum(max_rows_M))
