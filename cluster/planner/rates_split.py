"""How a group splits the rows of an expert over its copies in a step of mean loads: as its members do. Pure.

L MoE layers, E experts of a layer, M members
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.planner.layer.problem import Split
from model.dispatch.row_split import layer_copies, split_rows
from model.placement import Placement


def split_by_rates(placement: Placement, num_rows_LE: npt.NDArray[np.int64]) -> tuple[Split, ...]:
    """Of each layer, by the placement's rates. An expert without rows: alike."""
    known: dict[object, Split] = {}
    splits = []
    for holders, num_rows_E in zip(placement.holders, num_rows_LE, strict=True):
        key = (holders, num_rows_E.tobytes())
        if key not in known:
            rows_EM = split_rows(layer_copies(holders, placement.num_members, placement.rates), num_rows_E)
            known[key] = tuple(
                tuple((rows_M[list(ranks)] / num_rows).tolist()) if num_rows else (1.0 / len(ranks),) * len(ranks)
                for ranks, rows_M, num_rows in zip(holders, rows_EM, num_rows_E.tolist(), strict=True))
        splits.append(known[key])
    return tuple(splits)
