"""The split of an expert's rows over its copies in a step of mean loads, as the members do it. Pure.

L MoE layers, E experts of a layer, M members
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.planner.costs.alike_layers import for_each_layer
from cluster.planner.layer.problem import Split
from model.dispatch.row_split import layer_copies, split_rows
from model.placement import Placement


def split_by_rates(placement: Placement, num_rows_LE: npt.NDArray[np.int64]) -> tuple[Split, ...]:
    """Split the rows of each layer by the placement's rates. Of an expert without rows: equally."""
    def split(layer: int) -> Split:
        holders, num_rows_E = placement.holders[layer], num_rows_LE[layer]
        rows_EM = split_rows(layer_copies(holders, placement.num_members, placement.rates), num_rows_E)
        return tuple(tuple((rows_M[list(ranks)] / num_rows).tolist()) if num_rows else (1.0 / len(ranks),) * len(ranks)
                     for ranks, rows_M, num_rows in zip(holders, rows_EM, num_rows_E.tolist(), strict=True))

    keys = ((holders, num_rows_E.tobytes())
            for holders, num_rows_E in zip(placement.holders, num_rows_LE, strict=True))
    return tuple(for_each_layer(keys, split))
