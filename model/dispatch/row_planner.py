"""Plans the rows of a layer for one member: in C where that is built, else in numpy. Both answer alike."""

from __future__ import annotations

import logging
from typing import Protocol

from model.arrays import IdArray, IntArray
from model.dispatch.compiled_row_planner import CompiledRowPlanner
from model.dispatch.row_plan import LayerRouting, RowPlan, layer_routing, plan_rows
from model.kernels.packed_cpu_library import KernelLibrary, KernelLibraryError
from model.placement import Placement

logger = logging.getLogger(__name__)


class RowPlanner(Protocol):
    routing: LayerRouting

    def plan(self, expert_ids_SK: IdArray, owner_S: IntArray, own: slice) -> RowPlan:
        """Plan as plan_rows does. `own` has a start and a stop; rows of expert_ids [S, K] may lie apart in memory."""


class NumpyRowPlanner:
    """See RowPlanner."""

    def __init__(self, routing: LayerRouting) -> None:
        self.routing = routing

    def plan(self, expert_ids_SK: IdArray, owner_S: IntArray, own: slice) -> RowPlan:
        return plan_rows(self.routing, expert_ids_SK, owner_S, own)


def row_planners(placement: Placement, rank: int) -> list[RowPlanner]:
    """Return a planner for each MoE layer."""
    routings = [layer_routing(placement, layer, rank) for layer in range(placement.num_layers)]
    try:
        library = KernelLibrary()
    except KernelLibraryError as error:
        logger.info("rows_planned_in_numpy why=%s", error)
        return [NumpyRowPlanner(routing) for routing in routings]
    return [CompiledRowPlanner(routing, library) for routing in routings]
