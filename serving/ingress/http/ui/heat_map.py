"""The holders and the load of every expert, packed for the page: 2 bytes and 1 byte an expert. Pure.

L MoE layers, E experts of a layer
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np

from model.placement import Placement
from serving.engine.expert_load import ExpertLoad

MAX_CELLS = 2**17           # of a page: no model has more
LOAD_STEPS = 32             # in which a load is told: so many are the mean of its layer, 255 eight times as much


@dataclass(frozen=True, slots=True)
class HolderMap:
    """`cells`: base64 of 16-bit little-endian numbers [L, E], each the index in `sets` of the ranks that hold it."""

    num_layers: int
    num_experts: int
    sets: tuple[tuple[int, ...], ...]
    cells: str


@dataclass(frozen=True, slots=True)
class LoadMap:
    """`cells`: base64 of bytes [L, E], the rows of an expert over the mean of its layer, in LOAD_STEPS."""

    num_layers: int
    num_experts: int
    steps: int
    cells: str
    is_counted: bool            # False: nothing was counted yet


def holder_map(placement: Placement) -> HolderMap | None:
    """Return who holds what; None for a model with more than MAX_CELLS experts, or without any."""
    num_layers = placement.num_layers
    num_experts = len(placement.holders[0]) if num_layers else 0
    if not 0 < num_layers * num_experts <= MAX_CELLS:
        return None
    sets: dict[tuple[int, ...], int] = {}
    cells_LE = np.array([[sets.setdefault(ranks, len(sets)) for ranks in layer] for layer in placement.holders],
                        dtype="<u2")
    if len(sets) > np.iinfo(np.uint16).max:
        return None
    return HolderMap(num_layers, num_experts, tuple(sets), base64.b64encode(cells_LE.tobytes()).decode())


def load_map(load: ExpertLoad) -> LoadMap | None:
    """Return how busy each expert is; None as holder_map()."""
    if not 0 < load.num_layers * load.num_experts <= MAX_CELLS:
        return None
    rows_LE = load.rows()
    mean_L1 = rows_LE.mean(axis=1, keepdims=True)
    steps_LE = np.divide(rows_LE * LOAD_STEPS, mean_L1, out=np.zeros_like(rows_LE), where=mean_L1 > 0)
    cells_LE = np.minimum(np.rint(steps_LE), 255).astype(np.uint8)
    return LoadMap(load.num_layers, load.num_experts, LOAD_STEPS, base64.b64encode(cells_LE.tobytes()).decode(),
                   bool(mean_L1.any()))
