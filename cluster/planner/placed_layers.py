"""The holders of every layer's experts, decided before the shares of the requests. Pure.

M members, E experts of a layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.planner.costs.alike_layers import for_each_layer
from cluster.planner.costs.exchange_cost import least_exchange_seconds
from cluster.planner.even_placement import even_holders
from cluster.planner.layer.error import PlacementError
from cluster.planner.layer.exact import solve_exact
from cluster.planner.layer.greedy import solve_greedy
from cluster.planner.layer.linear_program import lower_bound
from cluster.planner.layer.problem import Holders, LayerProblem, LayerSolution, Split
from cluster.planner.layer.spare_copies import add_spare_copies, spare_split
from cluster.planner.local_placement import LocalFit
from cluster.planner.member_roles import choose_roles
from cluster.planner.memory_plan import RunningMembers, max_slots
from cluster.planner.placement_plan import PlanOptions, Solver
from cluster.planner.role_fit import MemoryPlanner, RoleFit, Roles, slots_of_layers

MAX_LAYER_S = 3.0           # that the exact solver gets for one layer


@dataclass(frozen=True, slots=True)
class PlacedLayers:
    holders: tuple[Holders, ...]
    splits: tuple[Split, ...]
    bound_s: float                  # of all layers' experts and exchanges; local: of the whole step
    takes_requests: tuple[bool, ...]
    solver: Solver
    rows_M: tuple[float, ...] | None = None     # None: shared out by what is left of the memory
    is_local: bool = False          # who takes requests holds every expert


def best_layers(planner: MemoryPlanner, options: PlanOptions, before: Sequence[Holders] | None) -> PlacedLayers:
    """Choose the roles, unless they run already, and solve every layer. `before`: the holders of now."""
    fit = choose_roles(planner) if options.running is None else _running_fit(planner, options.running)
    problems = _layer_problems(planner, fit, before)
    keys = [_key(problem) for problem in problems]
    limit_s = min(MAX_LAYER_S, options.time_limit_s / len(set(keys)))
    layers = for_each_layer(keys, lambda layer: solve_exact(problems[layer], limit_s) if options.exact
                            else solve_greedy(problems[layer]))
    holders = _with_spare_copies(planner, options, problems, layers)
    splits = tuple(spare_split(layer.split, layer.holders, more) for layer, more in zip(layers, holders, strict=True))
    bound_s = sum(layer.bound_s for layer in layers) + _least_exchange_s(planner, problems)
    return PlacedLayers(holders, splits, bound_s, fit.roles.takes_requests, "exact" if options.exact else "greedy")


def local_layers(planner: MemoryPlanner, local: LocalFit, solver: Solver) -> PlacedLayers:
    """Place every expert on every member that takes requests."""
    args = planner.costs.args
    ranks = tuple(rank for rank, takes in enumerate(local.takes_requests) if takes)
    parts = tuple(float(local.rows_M[rank] / local.rows_M.sum()) for rank in ranks)
    return PlacedLayers(((ranks,) * args.num_experts,) * args.num_moe_layers,
                        ((parts,) * args.num_experts,) * args.num_moe_layers, local.bound_s, local.takes_requests,
                        solver, tuple(local.rows_M.tolist()), is_local=True)


def even_layers(planner: MemoryPlanner) -> PlacedLayers:
    """Place experts and requests alike on all members, as far as memory allows."""
    args, everybody = planner.costs.args, (True,) * len(planner.memories)
    slots_M = tuple(max_slots(memory, planner.demand) for memory in planner.memories)
    holders = even_holders(slots_M, args.num_moe_layers, args.num_experts, planner.min_copies)
    splits = tuple(tuple((1 / len(ranks),) * len(ranks) for ranks in layer) for layer in holders)
    problems = _layer_problems(planner, RoleFit(Roles(everybody, everybody), 0.0, slots_M), None)
    bounds = for_each_layer(map(_key, problems), lambda layer: lower_bound(problems[layer]))
    bound_s = sum(bounds) + _least_exchange_s(planner, problems)
    return PlacedLayers(holders, splits, bound_s, everybody, "even", (1.0,) * len(slots_M))


def _running_fit(planner: MemoryPlanner, running: RunningMembers) -> RoleFit:
    slots_M = tuple(min(slots, planner.demand.num_slots) for slots in running.slots_M)
    if sum(slots_M) < planner.num_wanted:
        raise PlacementError(f"the members that run have room for {sum(slots_M)} expert copies, {planner.num_wanted} "
                             "are wanted", fix="raise the memory budgets and start again, or set min_copies to 1")
    return RoleFit(Roles(running.takes_requests, tuple(slots > 0 for slots in slots_M)), 0.0, slots_M)


def _layer_problems(planner: MemoryPlanner, fit: RoleFit, before: Sequence[Holders] | None) -> list[LayerProblem]:
    costs = planner.costs
    slots = slots_of_layers(fit.slots_M, costs.args.num_moe_layers)
    costs_LEM = costs.of_each_load(lambda layer: costs.expert_costs(costs.probability(layer)))
    return [LayerProblem(costs_EM, slots[layer], planner.min_copies,
                         previous=before[layer] if before is not None else None)
            for layer, costs_EM in enumerate(costs_LEM)]


def _key(problem: LayerProblem) -> tuple[object, ...]:
    """Return what is equal for layers that have the same solution."""
    return problem.costs_EM.tobytes(), problem.slots_M, problem.previous


def _with_spare_copies(planner: MemoryPlanner, options: PlanOptions, problems: Sequence[LayerProblem],
                       layers: Sequence[LayerSolution]) -> tuple[Holders, ...]:
    """Add copies in free slots. A replan loads no more than it must.

    Experts that have several copies anyway are levelled as they are.
    """
    if options.min_copies > 1:
        return tuple(layer.holders for layer in layers)
    return tuple(add_spare_copies(solved.holders, problem.slots_M, planner.costs.probability(layer), problem.previous,
                                  may_load=options.exact or problem.previous is None)
                 for layer, (problem, solved) in enumerate(zip(problems, layers, strict=True)))


def _least_exchange_s(planner: MemoryPlanner, problems: Sequence[LayerProblem]) -> float:
    costs = planner.costs
    return sum(for_each_layer(map(_key, problems), lambda layer: least_exchange_seconds(
        costs.profiles, costs.workload.num_rows, costs.probability(layer), problems[layer].slots_M, costs.row_bytes)))
