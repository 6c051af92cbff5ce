"""The coordinator's calls of the planner, each for a thread of its own: a plan takes up to some seconds.

The planner is imported here when it is used: its solver, SciPy, takes a second to import, and shards, routers and the
command line, which import other files of this folder, do not plan.
"""

from __future__ import annotations

from cluster.coordinator.membership import GroupPlanned, GroupRules
from cluster.coordinator.placement_change import ended_with
from cluster.planner.layer.error import PlacementError
from cluster.planner.plan_rules import BestChange, PlanRules
from model.arrays import FloatArray
from model.placement import Placement
from serving.link.epoch import Epoch, Member, PlannedPlacement


def plan_members(members: tuple[Member, ...], rules: GroupRules, before: Epoch | None) -> GroupPlanned:
    """Plan for members that start. `before`: the epoch that ended."""
    from cluster.planner.group_plan import plan_group

    shard_ids = tuple(member.shard_id for member in members)
    changes = ended_with(before, "the epoch ended") if before else ()
    try:
        return GroupPlanned(shard_ids, plan_group(members, rules.plan, before), changes=changes)
    except PlacementError as error:
        return GroupPlanned(shard_ids, None, str(error))


def plan_change(epoch: Epoch, rules: PlanRules, load_LE: FloatArray | None, slots: tuple[int, ...]) -> BestChange:
    """Find the best that the running members can change to. Raises PlacementError."""
    from cluster.planner.group_plan import best_change

    return best_change(epoch, rules, load_LE, slots)


def plan_given(placement: Placement, epoch: Epoch, rules: PlanRules, load_LE: FloatArray | None) -> PlannedPlacement:
    """Check and rate a placement that somebody made. Raises PlacementError."""
    from cluster.planner.group_plan import checked_placement

    return checked_placement(placement, epoch, rules, load_LE)
