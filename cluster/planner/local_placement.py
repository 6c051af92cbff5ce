"""Placement without an exchange: every member that takes requests holds every expert. Pure.

Where memory allows, this saves the exchange and reads the same experts on several members.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planner.member_roles import mean_probability, slowest_first
from cluster.planner.memory_plan import free_bytes, max_slots
from cluster.planner.request_shares import share_rows
from cluster.planner.role_fit import MemoryPlanner
from model.arrays import FloatArray

BOUND_PART = 0.998      # the best shares are found on straight lines between knots, which differ by less than the rest


@dataclass(frozen=True, slots=True)
class LocalFit:
    """The members that take requests, and the rows of each."""

    takes_requests: tuple[bool, ...]
    rows_M: FloatArray
    bound_s: float          # of a step: no other rows of these members are faster
    effective_s: float      # where the KV caches hold only a part of the rows: of so many more steps


def choose_local(planner: MemoryPlanner) -> LocalFit | None:
    """Choose the best of the fastest member that can hold everything, the fastest two, and so on. None: none can."""
    costs, demand = planner.costs, planner.demand
    probability_E = mean_probability(costs)
    can_M = [free_bytes(memory, demand) >= 0 and max_slots(memory, demand) == demand.num_slots
             for memory in planner.memories]
    fastest = [rank for rank in reversed(slowest_first(costs, probability_E)) if can_M[rank]]
    best: LocalFit | None = None
    for count in range(planner.min_copies, len(fastest) + 1):
        takes = tuple(rank in fastest[:count] for rank in range(len(can_M)))
        max_rows_M = planner.max_rows(takes, [demand.num_slots if one else 0 for one in takes])
        rows_M, bound_s = share_rows(costs, takes, max_rows_M, costs.all_own_experts_s)
        step_s = max(costs.own_rows_s(rank, rows) + costs.all_own_experts_s(rank, rows)
                     for rank, rows in enumerate(rows_M))
        fit = LocalFit(takes, rows_M, bound_s * BOUND_PART, step_s * planner.steps_for_all_rows(sum(max_rows_M)))
        if best is None or _worth(planner, fit) < _worth(planner, best):
            best = fit
    return best


def _worth(planner: MemoryPlanner, fit: LocalFit) -> float:
    return fit.effective_s * planner.role_penalty(fit.takes_requests)
