"""Plans for the members of a group: when they start, and while they run. Pure.

It loads SciPy: who does not plan imports plan_rules, memory_plan or measured_profile instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.planner.costs.cost_model import StepPrediction, predict_step
from cluster.planner.costs.rates_split import split_by_rates
from cluster.planner.costs.step_costs import StepCosts, Workload
from cluster.planner.layer.error import PlacementError
from cluster.planner.layer.problem import Holders
from cluster.planner.memory_plan import MemberMemory, RunningMembers
from cluster.planner.placement import member_costs, plan_placement, predict_running, surviving_holders
from cluster.planner.placement_plan import PlacementPlan, PlannedMember, PlanOptions
from cluster.planner.plan_rules import BestChange, PlanRules, lacks_copies
from model.arrays import FloatArray
from model.placement import ExpertRate, Placement
from serving.link.epoch import DeviceProfile, Epoch, Member, PlanFigures, PlannedPlacement, RequestShare

PLAN_TIME_S = 10.0          # of the exact solver, at most, for all layers together


def plan_group(members: Sequence[Member], rules: PlanRules, before: Epoch | None = None) -> PlannedPlacement:
    """Plan placement and shares for members that start, in the order of their ranks. Raises PlacementError.

    Members that were in the epoch `before` keep their roles and what they held, as far as that is not much worse: then
    little is loaded, sequences stay, and the answer is there at once.
    """
    shard_ids = [member.shard_id for member in members]
    old_ids = [member.shard_id for member in before.members] if before else []
    if before is None or not set(old_ids) & set(shard_ids) or rules.config.policy == "even":
        plan = _plan(members, group_costs(members, rules, None), rules, _Before())
    else:
        ranks = [before.rank_of(shard_id) for shard_id in shard_ids]
        kept_roles = tuple(None if rank is None else before.takes_requests(rank) for rank in ranks)
        holders = surviving_holders(before.placement, old_ids, shard_ids)
        plan = _plan(members, group_costs(members, rules, None), rules, _Before(holders, kept_roles))
    return PlannedPlacement(plan.placement, plan.shares, _figures(rules, plan.prediction, plan.bound_s, plan.solver))


def best_change(epoch: Epoch, rules: PlanRules, load_LE: FloatArray | None, slots: tuple[int, ...]) -> BestChange:
    """Find what the running members can change to. Raises PlacementError.

    Where what runs is as good, has its copies and fits, nothing need be moved: only the rates are new.
    load_LE: rows counted by layer and expert, None when nothing is known. slots: copies that each member has room for.
    """
    costs = group_costs(epoch.members, rules, load_LE)
    running = predict_running(costs, epoch.placement, epoch.shares)
    takes_requests = tuple(epoch.takes_requests(rank) for rank in range(len(epoch.members)))
    before = _Before(epoch.placement.holders, running=RunningMembers(takes_requests, slots))
    plan = _plan(epoch.members, costs, rules, before)
    slowdown = slowdown_of_rates(costs, epoch.placement, epoch.shares, plan.placement.rates)
    fits = all(epoch.placement.num_experts_of(rank) <= room for rank, room in enumerate(slots))
    if plan.prediction.step_s < running.step_s or lacks_copies(epoch, rules) or not fits:
        figures = _figures(rules, plan.prediction, plan.bound_s, plan.solver)
        target = PlannedPlacement(plan.placement, plan.shares, figures)
    else:
        figures = _figures(rules, running, min(plan.bound_s, running.step_s),
                           epoch.figures.solver if epoch.figures else plan.solver)
        target = PlannedPlacement(replace(plan.placement, holders=epoch.placement.holders), epoch.shares, figures)
    return BestChange(running.step_s * slowdown, target, lacks_copies(epoch, rules))


def slowdown_of_rates(costs: StepCosts, placement: Placement, shares: Sequence[RequestShare],
                      rates: tuple[ExpertRate, ...]) -> float:
    """Return how many times as long a step takes by the rates that run as by others.

    By them the rows of an expert are split over its copies.
    """
    if rates == placement.rates:
        return 1.0
    num_rows_LE = np.rint(np.array(costs.probabilities()) * costs.workload.num_rows).astype(np.int64)
    now_s, then_s = (
        predict_step(costs, placement.holders, split_by_rates(replace(placement, rates=by), num_rows_LE), shares).step_s
        for by in (placement.rates, rates))
    return now_s / then_s


def checked_placement(placement: Placement, epoch: Epoch, rules: PlanRules,
                      load_LE: FloatArray | None = None) -> PlannedPlacement:
    """Rate a placement that somebody made for the epoch's members, with the shares that run. Raises PlacementError."""
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
    given = replace(epoch.placement, holders=placement.holders)
    prediction = predict_running(group_costs(epoch.members, rules, load_LE), given, epoch.shares)
    bound_s = min(epoch.figures.bound_s if epoch.figures else prediction.step_s, prediction.step_s)
    return PlannedPlacement(given, epoch.shares, _figures(rules, prediction, bound_s, "given"))


def group_costs(members: Sequence[Member], rules: PlanRules, load_LE: FloatArray | None) -> StepCosts:
    """Work out what the step that plans are made for costs these members, under these loads."""
    load = () if load_LE is None else tuple(tuple(row.tolist()) for row in load_LE)
    workload = Workload(rules.config.num_rows, rules.config.context_tokens, load)
    return member_costs(rules.args, rules.dtype_bytes, _planned_members(members), workload)


@dataclass(frozen=True, slots=True)
class _Before:
    """What is there already, by rank of the members that are planned for."""

    holders: Sequence[Holders] | None = None
    kept_roles: tuple[bool | None, ...] = ()
    running: RunningMembers | None = None


def _plan(members: Sequence[Member], costs: StepCosts, rules: PlanRules, before: _Before) -> PlacementPlan:
    is_replan = before.holders is not None and before.running is None
    num_holders = sum(slots > 0 for slots in before.running.slots_M) if before.running else len(members)
    options = PlanOptions(policy=rules.config.policy, min_copies=rules.num_copies(max(1, num_holders)),
                          exact=not is_replan, time_limit_s=PLAN_TIME_S, kept_roles=before.kept_roles,
                          running=before.running)
    return plan_placement(costs, _planned_members(members), rules.demand, rules.max_batch_tokens, options,
                          before.holders)


def _figures(rules: PlanRules, prediction: StepPrediction, bound_s: float, solver: str) -> PlanFigures:
    return PlanFigures(rules.config.num_rows, rules.config.context_tokens, prediction.step_s, bound_s,
                       prediction.limit, solver)


def _planned_members(members: Sequence[Member]) -> list[PlannedMember]:
    return [PlannedMember(member.shard_id, _profile_of(member), _memory_of(member), member.pool) for member in members]


def _profile_of(member: Member) -> DeviceProfile:
    if member.profile is None:
        raise PlacementError(f"shard {member.shard_id} on node {member.node_name} has not measured its device",
                             fix="restart that shard")
    return member.profile


def _memory_of(member: Member) -> MemberMemory:
    return MemberMemory(member.node_name, member.facts.memory_budget_bytes, member.facts.resident_bytes)
