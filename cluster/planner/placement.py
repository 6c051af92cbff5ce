"""The placement of a whole group: who holds which experts, who takes which requests, and how close to the best. Pure.

M members
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.planner.costs.cost_model import StepPrediction, predict_step
from cluster.planner.costs.device_curves import expert_rate
from cluster.planner.costs.exchange_cost import collective_bytes
from cluster.planner.costs.step_costs import StepCosts, Workload
from cluster.planner.layer.error import PlacementError
from cluster.planner.layer.problem import Holders
from cluster.planner.local_placement import choose_local
from cluster.planner.memory_fit import does_not_fit, memory_fit
from cluster.planner.memory_plan import MemoryDemand, free_bytes, memory_use
from cluster.planner.placed_layers import PlacedLayers, best_layers, even_layers, local_layers
from cluster.planner.placement_plan import MemberPlan, PlacementPlan, PlannedMember, PlanOptions
from cluster.planner.request_shares import request_shares, share_rows
from cluster.planner.role_fit import MemoryPlanner
from model.args import ModelArgs
from model.placement import Placement
from serving.link.epoch import RequestShare

LEAST_KEPT_ROWS = 1e-3      # of a step, on a member that takes requests already: its role stays, little comes to it
WORTH_ALL_EXPERTS = 0.998   # every expert on every member must make the step this much shorter


def member_costs(args: ModelArgs, dtype_bytes: int, members: Sequence[PlannedMember], workload: Workload) -> StepCosts:
    """Work out what a step costs these members. Raises PlacementError for what is wrong with them."""
    return StepCosts(args, dtype_bytes, [member.profile for member in members], workload,
                     [member.name for member in members])


def plan_placement(costs: StepCosts, members: Sequence[PlannedMember], demand: MemoryDemand, max_batch_tokens: int,
                   options: PlanOptions, previous: Sequence[Holders] | None = None) -> PlacementPlan:
    """Plan for these members, whose step `costs` so much. Raises PlacementError.

    `previous`: the holders of now, by rank of the same members; () for an expert that was lost.
    """
    _check_members(members, options)
    planner = MemoryPlanner(costs, demand, tuple(member.memory for member in members), options.min_copies,
                            options.running.takes_requests if options.running else options.kept_roles)
    if previous is not None:
        _check_previous(previous, costs.args, len(members))
    if options.running is None or options.policy == "even":
        fit = memory_fit(planner.memories, demand, options.min_copies, options.policy)
        if not fit.is_enough:
            raise does_not_fit(fit)
    if options.policy == "even":
        return _finish(members, planner, even_layers(planner), max_batch_tokens, previous)
    result = _finish(members, planner, best_layers(planner, options, previous), max_batch_tokens, previous)
    if options.running is not None:
        return result
    local = choose_local(planner)
    result_s = result.prediction.step_s * planner.steps_for_all_rows(result.kv_rows)
    if local is None or (local.effective_s * planner.role_penalty(local.takes_requests)
                         >= result_s * planner.role_penalty(result.takes_requests) * WORTH_ALL_EXPERTS):
        return result
    return _finish(members, planner, local_layers(planner, local, result.solver), max_batch_tokens, previous)


def predict_running(costs: StepCosts, placement: Placement, shares: Sequence[RequestShare]) -> StepPrediction:
    """Predict the step of a placement that runs, with the best split of the rows. Raises PlacementError.

    The loads of `costs` may be others than it was made for.
    """
    num_members = len(costs.profiles)
    _check_previous(placement.holders, costs.args, num_members)
    if len(shares) != num_members or placement.num_members != num_members:
        raise PlacementError(f"{len(shares)} shares and a placement of {placement.num_members} members for "
                             f"{num_members} members", fix="give those of the epoch that these members are in")
    return predict_step(costs, placement.holders, None, shares)


def surviving_holders(placement: Placement, old_names: Sequence[str], new_names: Sequence[str]) -> tuple[Holders, ...]:
    """Give the placement by the ranks of another group: () for an expert whose holders are all gone."""
    new_rank = {name: rank for rank, name in enumerate(new_names)}
    rank_of = [new_rank.get(name) for name in old_names]
    return tuple(tuple(tuple(sorted(new for rank in ranks if (new := rank_of[rank]) is not None)) for ranks in layer)
                 for layer in placement.holders)


def _finish(members: Sequence[PlannedMember], planner: MemoryPlanner, layers: PlacedLayers, max_batch_tokens: int,
            previous: Sequence[Holders] | None) -> PlacementPlan:
    costs, is_even = planner.costs, layers.solver == "even"
    rates = () if is_even else tuple(expert_rate(member.profile) for member in members)
    placement = Placement(len(members), layers.holders, rates,
                          None if is_even else collective_bytes([member.profile for member in members]))
    copies = [placement.num_experts_of(rank) for rank in range(len(members))]
    max_rows_M = planner.max_rows(layers.takes_requests, copies)
    rows_M = layers.rows_M or _shared_rows(planner, layers.takes_requests, max_rows_M)
    shares = request_shares(rows_M, max_batch_tokens)
    plans = tuple(
        MemberPlan(member.name, share, memory_use(member.memory, planner.demand, count, share.fraction > 0), count)
        for member, share, count in zip(members, shares, copies, strict=True))
    prediction = predict_step(costs, layers.holders, layers.splits, shares)
    bound_s = layers.bound_s
    if not layers.is_local:
        can_take = [free_bytes(memory, planner.demand) >= 0 for memory in planner.memories]
        bound_s += share_rows(costs, can_take)[1]
    moved = sum(len(set(ranks) - set(previous[layer][expert] if previous is not None else ()))
                for layer, of_layer in enumerate(layers.holders) for expert, ranks in enumerate(of_layer))
    return PlacementPlan(placement, layers.splits, plans, prediction, bound_s, sum(max_rows_M),
                         moved * planner.demand.expert_bytes, layers.solver)


def _shared_rows(planner: MemoryPlanner, takes_requests: Sequence[bool], max_rows_M: Sequence[float]) -> list[float]:
    """Share out the step's rows. Who runs and takes requests takes some: without any its role would be another."""
    rows_M = share_rows(planner.costs, takes_requests, max_rows_M)[0].tolist()
    kept_roles = planner.kept_roles or (None,) * len(rows_M)
    return [max(rows, LEAST_KEPT_ROWS) if takes and kept else rows
            for rows, takes, kept in zip(rows_M, takes_requests, kept_roles, strict=True)]


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
