"""The choice which members take requests and which hold experts. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from cluster.planner.costs.exchange_cost import exchange_seconds
from cluster.planner.costs.step_costs import StepCosts
from cluster.planner.layer.linear_program import everything_open
from cluster.planner.layer.problem import LayerProblem
from cluster.planner.memory_plan import free_bytes
from cluster.planner.request_shares import share_rows
from cluster.planner.role_fit import MemoryPlanner, RoleFit, Roles, slots_of_layers
from model.arrays import FloatArray

MAX_CHOICES = 64            # of members, that are all tried
WORTH_A_ROLE = 0.998        # another role must make the step this much shorter
WORTH_A_MEMBER = 1.001      # a member without which the step is no longer than this is left out


def choose_roles(planner: MemoryPlanner) -> RoleFit:
    """Choose the best roles; those of members that run already stay where that costs little.

    There is room by memory_fit: that was asked before.
    """
    free = _search(replace(planner, kept_roles=()))
    assert free is not None, "memory_fit says that the members have room"
    kept = _search(planner) if planner.role_penalty(free.roles.takes_requests) > 1 else None
    if kept is None:
        return free
    probability_E = mean_probability(planner.costs)
    return min((free, kept), key=lambda fit: (estimate_step(planner, fit, probability_E)
                                              * planner.role_penalty(fit.roles.takes_requests)))


def _search(planner: MemoryPlanner) -> RoleFit | None:
    """Start with everything that fits, then take away what makes the predicted step longer, the worst first.

    Kept roles stay whatever they cost; None when nothing fits with them.
    An exchange costs whoever takes part in it, so several may have to leave before any of it is saved: the start is
    also tried with some members alone.
    """
    probability_E = mean_probability(planner.costs)
    ranks = range(len(planner.memories))
    fit = _first_fit(planner, ranks)
    if fit is None:
        return None
    now = (fit, estimate_step(planner, fit, probability_E))
    starts = (_first_fit(planner, some) for some in _some_members(planner, probability_E))
    now = _best_of(planner, now, [(one, 1.0) for one in starts if one is not None], probability_E)
    while True:
        fewer = ((planner.fit(roles), limit) for roles, limit in _fewer(planner, now[0].roles))
        options = [(one, limit) for one, limit in fewer if one is not None and one.roles != now[0].roles]
        better = _best_of(planner, now, options, probability_E)
        if better is now:
            return now[0]
        now = better


def _best_of(planner: MemoryPlanner, now: tuple[RoleFit, float], options: list[tuple[RoleFit, float]],
             probability_E: FloatArray) -> tuple[RoleFit, float]:
    """Return the best of the options that stay under their part of the time of now; now when none does."""
    best = now
    for fit, limit in options:
        seconds = estimate_step(planner, fit, probability_E)
        if seconds <= (now[1] * limit if best is now else best[1]):
            best = (fit, seconds)
    return best


def slowest_first(costs: StepCosts, probability_E: FloatArray) -> list[int]:
    """Return the ranks in the order of what an equal part of the work takes."""
    rows = costs.workload.num_rows / len(costs.profiles)
    seconds = [costs.args.num_moe_layers * costs.own_experts_s(rank, rows, probability_E) + costs.own_rows_s(rank, rows)
               for rank in range(len(costs.profiles))]
    return sorted(range(len(seconds)), key=lambda rank: (-seconds[rank], -rank))


def _some_members(planner: MemoryPlanner, probability_E: FloatArray) -> Iterator[list[int]]:
    """Yield the ranks of a part of the members: every choice when they are few, else the fastest ones."""
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
    """Yield roles with one thing less, each with the part of the time to stay under. Of members alike only one."""
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
    """Give these members alone all that their memory allows, and requests where they do not slow the others."""
    demand, everybody = planner.demand, range(len(planner.memories))
    takes = [rank in ranks and free_bytes(planner.memories[rank], demand) >= 0 for rank in everybody]
    holds = [rank in ranks and free_bytes(planner.memories[rank], demand, False) >= 0 for rank in everybody]
    if any(takes):
        rows_M, _ = share_rows(planner.costs, takes)
        takes = [bool(rows > 0) for rows in rows_M]
    return Roles(tuple(takes), tuple(holds))


def _first_fit(planner: MemoryPlanner, ranks: Sequence[int]) -> RoleFit | None:
    """Fit these members alone. While the experts do not fit, the slowest one's requests are given up. None: never."""
    roles = _first_roles(planner, ranks)
    rows = planner.costs.workload.num_rows / len(ranks)
    while (fit := planner.fit(roles)) is None:
        takers = [rank for rank, takes in enumerate(roles.takes_requests) if takes]
        if len(takers) < 2:
            return next((fit for one in _one_taker(planner, ranks) if (fit := planner.fit(one)) is not None), None)
        roles = roles.without_requests(max(takers, key=lambda rank: planner.costs.own_rows_s(rank, rows)))
    return fit


def _one_taker(planner: MemoryPlanner, ranks: Sequence[int]) -> Iterator[Roles]:
    """Give requests to one of these members alone: first to those that the speeds would choose, then to any."""
    first, everybody = _first_roles(planner, ranks), range(len(planner.memories))
    for taker in sorted(ranks, key=lambda rank: (not first.takes_requests[rank], rank)):
        if free_bytes(planner.memories[taker], planner.demand) >= 0:
            yield Roles(tuple(rank == taker for rank in everybody), first.holds_experts)


def mean_probability(costs: StepCosts) -> FloatArray:
    """Return the chances of a layer like the others: its experts from the hottest to the coldest, on average."""
    mean_E: FloatArray = np.mean([np.sort(probability_E)[::-1] for probability_E in costs.probabilities()], axis=0)
    return mean_E


def estimate_step(planner: MemoryPlanner, fit: RoleFit, probability_E: FloatArray) -> float:
    """Return the seconds of a step whose layers all are like the given one, with copies in fractions.

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
