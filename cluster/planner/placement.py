"""The placement of a whole group: who holds which experts, who takes which requests, and how close to the best. Pure.

M members, L MoE layers, E experts of a layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.planner.cost_model import StepPrediction, predict
from cluster.planner.device_curves import expert_rate
from cluster.planner.even_placement import even_holders
from cluster.planner.exchange_cost import collective_bytes, least_exchange_seconds
from cluster.planner.layer.arrays import FloatArray
from cluster.planner.layer.error import PlacementError as PlacementError
from cluster.planner.layer.exact import solve_exact
from cluster.planner.layer.greedy import solve_greedy
from cluster.planner.layer.linear_program import lower_bound
from cluster.planner.layer.problem import Holders, LayerProblem, LayerSolution, Split
from cluster.planner.layer.spare_copies import add_spare_copies, spare_split
from cluster.planner.local_placement import LocalFit, choose_local
from cluster.planner.member_roles import MemoryPlanner, RoleFit, Roles, choose_roles, does_not_fit, slots_of_layers
from cluster.planner.memory_plan import (
    MemberMemory,
    MemoryDemand,
    MemoryUse,
    RunningMembers,
    free_bytes,
    max_slots,
    memory_use,
)
from cluster.planner.request_shares import request_shares, share_rows
from cluster.planner.step_costs import StepCosts, Workload
from model.args import ModelArgs
from model.memory import shared_bytes
from model.placement import Placement
from serving.link.epoch import DeviceProfile, RequestShare

MAX_LAYER_S = 3.0           # that the exact solver gets for one layer
WORTH_ALL_EXPERTS = 0.998   # every expert on every member must make the step this much shorter


@dataclass(frozen=True, slots=True)
class PlannedMember:
    name: str
    profile: DeviceProfile
    memory: MemberMemory
    pool: str = ""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    policy: Literal["speed", "even"] = "speed"  # even: equal numbers of experts and requests
    min_copies: int = 1                         # members that every expert is on, at least
    exact: bool = True                          # False: in well under a second, for replans
    time_limit_s: float = 30.0                  # of the exact solver, for all layers together
    running: RunningMembers | None = None       # None: nothing runs yet, so roles and room are the planner's choice


@dataclass(frozen=True, slots=True)
class MemberPlan:
    name: str
    share: RequestShare
    memory: MemoryUse
    num_expert_copies: int          # of all layers


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    placement: Placement
    splits: tuple[Split, ...]       # of each layer: the expected part of each holder
    members: tuple[MemberPlan, ...]
    prediction: StepPrediction
    bound_s: float                  # no placement in the same slots and no shares make a faster step (without an
                                    # exchange: no shares of the same members)
    kv_rows: float                  # rows of the workload's context that the KV caches hold together
    moved_bytes: int                # of expert copies that `previous` has not
    solver: Literal["exact", "greedy", "even"]

    @property
    def ratio(self) -> float:
        return self.prediction.step_s / self.bound_s

    @property
    def shares(self) -> tuple[RequestShare, ...]:
        return tuple(member.share for member in self.members)


def plan_placement(args: ModelArgs, demand: MemoryDemand, members: Sequence[PlannedMember], workload: Workload,
                   max_batch_tokens: int, options: PlanOptions, previous: Placement | Sequence[Holders] | None = None,
                   ) -> PlacementPlan:
    """`previous`: of the same members by rank; the holders alone may lack those of experts that were lost."""
    _check_members(members, options)
    dtype_bytes = max(1, round(demand.shared_bytes / shared_bytes(args, 1)))
    costs = StepCosts(args, dtype_bytes, [member.profile for member in members], workload,
                      [member.name for member in members])
    planner = MemoryPlanner(costs, demand, tuple(member.memory for member in members), options.min_copies)
    before = previous.holders if isinstance(previous, Placement) else previous
    if before is not None:
        _check_previous(before, args, len(members))
    if options.policy == "even":
        return _finish(members, planner, _even_layers(planner), max_batch_tokens, before)
    result = _finish(members, planner, _best_layers(planner, options, before), max_batch_tokens, before)
    if options.running is not None:
        return result
    local = choose_local(planner)
    result_s = result.prediction.step_s * planner.steps_for_all_rows(result.kv_rows)
    if local is None or local.effective_s >= result_s * WORTH_ALL_EXPERTS:
        return result
    return _finish(members, planner, _local_layers(planner, local, result.solver), max_batch_tokens, before)


def predict_running(args: ModelArgs, members: Sequence[PlannedMember], placement: Placement,
                    shares: Sequence[RequestShare], workload: Workload, dtype_bytes: int) -> StepPrediction:
    """The step of a placement that runs, under other loads than it was made for, with the best split of the rows."""
    _check_previous(placement.holders, args, len(members))
    if len(shares) != len(members) or placement.num_members != len(members):
        raise PlacementError(f"{len(shares)} shares and a placement of {placement.num_members} members for "
                             f"{len(members)} members", fix="give those of the epoch that these members are in")
    costs = StepCosts(args, dtype_bytes, [member.profile for member in members], workload,
                      [member.name for member in members])
    return predict(costs, placement.holders, None, [share.fraction for share in shares])


def surviving_holders(placement: Placement, old_names: Sequence[str], new_names: Sequence[str]) -> tuple[Holders, ...]:
    """The placement by the ranks of another group: () for an expert whose holders are all gone."""
    new_rank = {name: rank for rank, name in enumerate(new_names)}
    rank_of = [new_rank.get(name) for name in old_names]
    return tuple(tuple(tuple(sorted(new for rank in ranks if (new := rank_of[rank]) is not None)) for ranks in layer)
                 for layer in placement.holders)


@dataclass(frozen=True, slots=True)
class _Layers:
    """What was decided before the shares of the requests."""

    holders: tuple[Holders, ...]
    splits: tuple[Split, ...]
    bound_s: float                  # of all layers' experts and exchanges; local: of the whole step
    takes_requests: tuple[bool, ...]
    solver: Literal["exact", "greedy", "even"]
    rows_M: tuple[float, ...] | None = None     # None: shared out by what is left of the memory
    is_local: bool = False          # who takes requests holds every expert


def _best_layers(planner: MemoryPlanner, options: PlanOptions, before: Sequence[Holders] | None) -> _Layers:
    fit = choose_roles(planner) if options.running is None else _running_fit(planner, options.running)
    problems = _layer_problems(planner, fit, before)
    distinct = {_key(problem): problem for problem in problems}
    limit_s = min(MAX_LAYER_S, options.time_limit_s / len(distinct))
    solved: dict[object, LayerSolution] = {
        key: solve_exact(problem, limit_s) if options.exact else solve_greedy(problem)
        for key, problem in distinct.items()}
    layers = [solved[_key(problem)] for problem in problems]
    holders = _with_spare_copies(planner, options, problems, layers)
    splits = tuple(spare_split(layer.split, layer.holders, more) for layer, more in zip(layers, holders, strict=True))
    bound_s = sum(layer.bound_s for layer in layers) + _least_exchange_s(planner, problems)
    return _Layers(holders, splits, bound_s, fit.roles.takes_requests, "exact" if options.exact else "greedy")


def _with_spare_copies(planner: MemoryPlanner, options: PlanOptions, problems: Sequence[LayerProblem],
                       layers: Sequence[LayerSolution]) -> tuple[Holders, ...]:
    """Experts that have several copies anyway are levelled as they are. A replan loads no more than it must."""
    if options.min_copies > 1:
        return tuple(layer.holders for layer in layers)
    return tuple(add_spare_copies(solved.holders, problem.slots_M, planner.costs.probability(layer), problem.previous,
                                  may_load=options.exact or problem.previous is None)
                 for layer, (problem, solved) in enumerate(zip(problems, layers, strict=True)))


def _running_fit(planner: MemoryPlanner, running: RunningMembers) -> RoleFit:
    slots_M = tuple(min(slots, planner.demand.num_slots) for slots in running.slots_M)
    if sum(slots_M) < planner.num_wanted:
        raise PlacementError(f"the members that run have room for {sum(slots_M)} expert copies, {planner.num_wanted} "
                             "are wanted", fix="raise the memory budgets and start again, or set min_copies to 1")
    return RoleFit(Roles(running.takes_requests, tuple(slots > 0 for slots in slots_M)), 0.0, slots_M)


def _least_exchange_s(planner: MemoryPlanner, problems: Sequence[LayerProblem]) -> float:
    costs = planner.costs
    known: dict[object, float] = {}
    for layer, problem in enumerate(problems):
        if _key(problem) not in known:
            known[_key(problem)] = least_exchange_seconds(
                costs.profiles, costs.workload.num_rows, costs.probability(layer), problem.slots_M, costs.row_bytes)
    return sum(known[_key(problem)] for problem in problems)


def _layer_problems(planner: MemoryPlanner, fit: RoleFit, before: Sequence[Holders] | None) -> list[LayerProblem]:
    costs = planner.costs
    slots = slots_of_layers(fit.slots_M, costs.args.num_moe_layers)
    known: dict[object, FloatArray] = {}
    problems = []
    for layer in range(costs.args.num_moe_layers):
        load = costs.workload.expert_load[layer] if costs.workload.expert_load else ()
        if load not in known:
            known[load] = costs.expert_costs(costs.probability(layer))
        problems.append(LayerProblem(known[load], slots[layer], planner.min_copies,
                                     previous=before[layer] if before is not None else None))
    return problems


def _key(problem: LayerProblem) -> object:
    """Equal for layers that have the same solution."""
    return problem.costs_EM.tobytes(), problem.slots_M, problem.previous


def _local_layers(planner: MemoryPlanner, local: LocalFit, solver: Literal["exact", "greedy", "even"]) -> _Layers:
    args = planner.costs.args
    ranks = tuple(rank for rank, takes in enumerate(local.takes_requests) if takes)
    parts = tuple(float(local.rows_M[rank] / local.rows_M.sum()) for rank in ranks)
    return _Layers(((ranks,) * args.num_experts,) * args.num_moe_layers,
                   ((parts,) * args.num_experts,) * args.num_moe_layers, local.bound_s, local.takes_requests, solver,
                   tuple(local.rows_M.tolist()), is_local=True)


def _even_layers(planner: MemoryPlanner) -> _Layers:
    args, everybody = planner.costs.args, (True,) * len(planner.memories)
    slots_M = [max_slots(memory, planner.demand) for memory in planner.memories]
    if min(free_bytes(memory, planner.demand) for memory in planner.memories) < 0 or sum(slots_M) < planner.num_wanted:
        raise does_not_fit(planner, [Roles(everybody, everybody)])
    holders = even_holders(slots_M, args.num_moe_layers, args.num_experts, planner.min_copies)
    splits = tuple(tuple((1 / len(ranks),) * len(ranks) for ranks in layer) for layer in holders)
    fit = RoleFit(Roles(everybody, everybody), 0.0, tuple(slots_M))
    problems = _layer_problems(planner, fit, None)
    bounds = {key: lower_bound(problem) for key, problem in {_key(one): one for one in problems}.items()}
    bound_s = sum(bounds[_key(problem)] for problem in problems) + _least_exchange_s(planner, problems)
    return _Layers(holders, splits, bound_s, everybody, "even", (1.0,) * len(slots_M))


def _finish(members: Sequence[PlannedMember], planner: MemoryPlanner, layers: _Layers, max_batch_tokens: int,
            before: Sequence[Holders] | None) -> PlacementPlan:
    costs, is_even = planner.costs, layers.solver == "even"
    rates = () if is_even else tuple(expert_rate(member.profile) for member in members)
    placement = Placement(len(members), layers.holders, rates,
                          None if is_even else collective_bytes([member.profile for member in members]))
    copies = [placement.num_experts_of(rank) for rank in range(len(members))]
    max_rows_M = planner.max_rows(layers.takes_requests, copies)
    rows_M = layers.rows_M or share_rows(costs, layers.takes_requests, max_rows_M)[0].tolist()
    shares = request_shares(rows_M, max_batch_tokens)
    plans = tuple(
        MemberPlan(member.name, share, memory_use(member.memory, planner.demand, count, share.fraction > 0), count)
        for member, share, count in zip(members, shares, copies, strict=True))
    prediction = predict(costs, layers.holders, layers.splits, [share.fraction for share in shares])
    bound_s = layers.bound_s
    if not layers.is_local:
        can_take = [free_bytes(memory, planner.demand) >= 0 for memory in planner.memories]
        bound_s += share_rows(costs, can_take)[1]
    moved = sum(len(set(ranks) - set(before[layer][expert] if before is not None else ()))
                for layer, of_layer in enumerate(layers.holders) for expert, ranks in enumerate(of_layer))
    return PlacementPlan(placement, layers.splits, plans, prediction, bound_s, sum(max_rows_M),
                         moved * planner.demand.expert_bytes, layers.solver)


def _check_members(members: Sequence[PlannedMember], options: PlanOptions) -> None:
    names = [member.name for member in members]
    if not names:
        raise PlacementError("there are no members", fix="give one or more")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlacementError(f"members {', '.join(twice)} are there more than once",
                             fix="give every member its own name")
    if not 1 <= options.min_copies <= len(members):
        raise PlacementError(f"min_copies={options.min_copies} with {len(members)} members: copies of an expert are on "
                             "different members", fix=f"set min_copies to 1..{len(members)}, or add members")


def _check_previous(holders: Sequence[Holders], args: ModelArgs, num_members: int) -> None:
    shape = (len(holders), {len(layer) for layer in holders})
    if shape != (args.num_moe_layers, {args.num_experts}):
        raise PlacementError(f"the previous placement has {shape[0]} layers with {sorted(shape[1])} experts, the model "
                             f"{args.num_moe_layers} with {args.num_experts}", fix="give one of the same model")
    unknown = sorted({rank for layer in holders for ranks in layer for rank in ranks if not 0 <= rank < num_members})
    if unknown:
        raise PlacementError(f"the previous placement names members {unknown}, there are 0..{num_members - 1}",
                             fix="translate it to the members that are there: surviving_holders")
