"""The rules of one service's plans, from its checkpoint and config, and what a plan of a change says.

Pure, and without SciPy: for all that know of plans and make none.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planner.memory_demand import DTYPE_BYTES, memory_demand
from cluster.planner.memory_plan import MemoryDemand
from model.args import ModelArgs
from serving.config import PlacementConfig, ServeConfig
from serving.link.epoch import Epoch, PlannedPlacement


@dataclass(frozen=True, slots=True)
class PlanRules:
    args: ModelArgs
    demand: MemoryDemand
    dtype_bytes: int
    max_batch_tokens: int
    config: PlacementConfig

    def num_copies(self, num_members: int) -> int:
        """Return the copies that every expert has at least, each on another member: a group of one has one."""
        return min(self.config.min_copies, num_members)


@dataclass(frozen=True, slots=True)
class BestChange:
    """The best that the running members of an epoch can change to, and what a step takes as long as they do not."""

    running_s: float
    target: PlannedPlacement
    restores_copies: bool = False   # experts that run have fewer than they should: members that held some are gone


def lacks_copies(epoch: Epoch, rules: PlanRules) -> bool:
    """Return whether an expert that runs has fewer copies than it should."""
    wanted = rules.num_copies(len(epoch.members))
    return any(len(ranks) < wanted for layer in epoch.placement.holders for ranks in set(layer))


def plan_rules(args: ModelArgs, config: ServeConfig) -> PlanRules:
    return PlanRules(args, memory_demand(args, config, config.num_members), DTYPE_BYTES[config.model.dtype],
                     config.scheduler.max_batch_tokens, config.placement)
