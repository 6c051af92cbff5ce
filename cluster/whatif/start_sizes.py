"""With how many of a cluster's devices a group can start, to grow as others join. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.planner.memory_fit import memory_fit
from cluster.planner.memory_plan import MemberMemory, MemoryDemand, free_bytes
from cluster.planner.placement_plan import PlanOptions


@dataclass(frozen=True, slots=True)
class StartSizes:
    """Numbers of devices that hold the model, of a cluster that does."""

    of_largest: int             # where the first to come are those with the most memory
    of_any: int                 # whichever come first: a safe min_replicas


def start_sizes(memories: Sequence[MemberMemory], demand: MemoryDemand, options: PlanOptions) -> StartSizes:
    """Return the least numbers. `demand`: of a group of all the devices, whose buffers are the largest."""
    by_room = sorted(memories, key=lambda memory: free_bytes(memory, demand, takes_requests=False))

    def least(in_order: Sequence[MemberMemory]) -> int:
        """Return how many of the first hold it: with more of them it fits all the more."""
        return bisect.bisect_left(range(len(in_order)), True, lo=options.min_copies, key=lambda num: memory_fit(
            in_order[:num], demand, options.min_copies, options.policy).is_enough)
    return StartSizes(least(by_room[::-1]), least(by_room))
