"""Plans for the members of a group: when they start, and while they run. Pure.

It loads SciPy: who does not plan imports plan_rules, memory_plan or measured_profile instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cluster.planner.cost_model import StepPrediction, Workload, predict_step
from cluster.planner.expert_times import chosen_probability
from cluster.planner.layer.arrays import FloatArray
from cluster.planner.layer.error import PlacementError
from cluster.planner.layer.problem import Holders
from cluster.planner.memory_plan import MemberMemory, RunningMembers
from cluster.planner.placement import PlannedMember, PlanOptions, plan_placement, predict_running, surviving_holders
from cluster.planner.plan_rules import BestChange, PlanRules
from cluster.planner.rates_split import split_by_rates
from model.placement import ExpertRate, Placement
from serving.link.epoch import DeviceProfile, Epoch, Member, PlanFigures, PlannedPlacement, RequestShare

PLAN_TIME_S = 10.0          # of the exact solver, at most, for all layers together


def plan_group(members: Sequence[Member], rules: PlanRules, before: Epoch | None = None) -> PlannedPlacement:
    """The best placement and shares for members that start, in the order of their ranks. Raises PlacementError.

    Members that were in the epoch `before` keep what they held, as far as that is not much worse: then little is
    loaded, and the answer is there at once.
    """
    shard_ids = [member.shard_id for member in members]
    old_ids = [member.shard_id for member in before.members] if before else []
    if before is None or not set(old_ids) & set(shard_ids) or rules.config.policy == "even":
        return _plan(members, rules, None, None, None)
    return _plan(members, rules, None, surviving_holders(before.placement, old_ids, shard_ids), None)


def best_change(epoch: Epoch, rules: PlanRules, load_LE: FloatArray | None, slots: tuple[int, ...]) -> BestChange:
    """Where what runs is as good, nothing need be moved: only the rates are new. Raises PlacementError.

    load_LE: rows counted by layer and expert, None when nothing is known. slots: copies that each member has room for.
    """
    running = _predict_group(epoch, rules, load_LE)
    takes_requests = tuple(epoch.takes_requests(rank) for rank in range(len(epoch.members)))
    target = _plan(epoch.members, rules, load_LE, epoch.placement.holders, RunningMembers(takes_requests, slots))
    slowdown = slowdown_of_rates(epoch, rules, load_LE, target.placement.rates)
    figures = target.figures
    assert figures is not None
    if figures.step_s >= running.step_s:
        solver = epoch.figures.solver if epoch.figures else figures.solver
        figures = replace(figures, step_s=running.step_s, bound_s=min(figures.bound_s, running.step_s),
                          limit=running.limit, solver=solver)
        target = PlannedPlacement(replace(target.placement, holders=epoch.placement.holders), epoch.shares, figures)
    return BestChange(running.step_s * slowdown, target)


def _plan(members: Sequence[Member], rules: PlanRules, load_LE: FloatArray | None,
          previous: Sequence[Holders] | None, running: RunningMembers | None) -> PlannedPlacement:
    config, is_replan = rules.config, previous is not None and running is None
    options = PlanOptions(policy=config.policy, min_copies=rules.num_copies(len(members)), exact=not is_replan,
                          time_limit_s=PLAN_TIME_S, running=running)
    plan = plan_placement(rules.args, rules.demand, _planned_members(members), _workload(rules, load_LE),
                          rules.max_batch_tokens, options, previous)
    figures = _figures(rules, plan.prediction, plan.bound_s, plan.solver)
    return PlannedPlacement(plan.placement, plan.shares, figures)


def _predict_group(epoch: Epoch, rules: PlanRules, load_LE: FloatArray | None) -> StepPrediction:
    """What the placement that runs takes for a step under this load, its rows split as well as they can be."""
    return predict_running(rules.args, _planned_members(epoch.members), epoch.placement, epoch.shares,
                           _workload(rules, load_LE), rules.dtype_bytes)


def slowdown_of_rates(epoch: Epoch, rules: PlanRules, load_LE: FloatArray | None,
                      rates: tuple[ExpertRate, ...]) -> float:
    """How much longer a step takes while rows are split over copies by the rates that run than it would by others."""
    args, workload = rules.args, _workload(rules, load_LE)
    if rates == epoch.placement.rates:
        return 1.0
    loads = workload.expert_load or ((1.0,) * args.num_experts,) * args.num_moe_layers
    num_rows_LE = np.array([chosen_probability(load_E, args.num_experts_per_tok) for load_E in loads])
    num_rows_LE = np.rint(num_rows_LE * workload.num_rows).astype(np.int64)
    even = RequestShare(1.0 / len(epoch.members), rules.max_batch_tokens)
    now_s, then_s = (predict_step(
        args, rules.dtype_bytes, [_profile_of(member) for member in epoch.members], epoch.placement,
        split_by_rates(replace(epoch.placement, rates=by), num_rows_LE), epoch.shares or (even,) * len(epoch.members),
        workload).step_s for by in (epoch.placement.rates, rates))
    return now_s / then_s


def checked_placement(placement: Placement, epoch: Epoch, rules: PlanRules,
                      load_LE: FloatArray | None = None) -> PlannedPlacement:
    """A placement that somebody made for the epoch's members, with the shares that run. Raises PlacementError."""
    num_layers, num_experts = rules.args.num_moe_layers, rules.args.num_experts
    if placement.num_members != len(epoch.members):
        raise PlacementError(f"the placement is for {placement.num_members} members, the epoch has "
                             f"{len(epoch.members)}", fix="start from `moesaic placement show --json`")
    shape = {len(layer) for layer in placement.holders}
    if placement.num_layers != num_layers or shape != {num_experts}:
        raise PlacementError(f"the placement has {placement.num_layers} layers of {sorted(shape)} experts, the model "
                             f"{num_layers} of {num_experts}", fix="name every expert of every MoE layer")
    copies = min(len(ranks) for layer in placement.holders for ranks in layer)
    if copies < rules.num_copies(len(epoch.members)):
        raise PlacementError(f"the placement has an expert with {copies} copies, placement.min_copies is "
                             f"{rules.config.min_copies}", fix="give every expert so many holders")
    given = replace(epoch, placement=replace(epoch.placement, holders=placement.holders))
    prediction = _predict_group(given, rules, load_LE)
    bound_s = min(epoch.figures.bound_s if epoch.figures else prediction.step_s, prediction.step_s)
    return PlannedPlacement(given.placement, epoch.shares, _figures(rules, prediction, bound_s, "given"))


def _figures(rules: PlanRules, prediction: StepPrediction, bound_s: float, solver: str) -> PlanFigures:
    return PlanFigures(rules.config.num_rows, rules.config.context_tokens, prediction.step_s, bound_s,
                       prediction.limit, solver)


def _workload(rules: PlanRules, load_LE: FloatArray | None) -> Workload:
    load = () if load_LE is None else tuple(tuple(row.tolist()) for row in load_LE)
    return Workload(rules.config.num_rows, rules.config.context_tokens, load)


def _planned_members(members: Sequence[Member]) -> list[PlannedMember]:
    return [PlannedMember(member.shard_id, _profile_of(member), _memory_of(member), member.pool) for member in members]


def _profile_of(member: Member) -> DeviceProfile:
    if member.profile is None:
        raise PlacementError(f"shard {member.shard_id} on node {member.node_name} has not measured its device",
                             fix="restart that shard")
    return member.profile


def _memory_of(member: Member) -> MemberMemory:
    return MemberMemory(member.node_name, member.facts.memory_budget_bytes, member.facts.resident_bytes)
