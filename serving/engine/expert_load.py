"""Counts how many rows each expert computes: on every shard, with decay, added up by the coordinator. Pure.

L MoE layers, E experts of a layer, N local slots of all layers
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from model.placement import Placement

_MAX_HALVINGS = 64.0        # between two rescalings: far from the end of a float


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Rows that one member computed for each expert, older ones counted for less, by logical expert id."""

    num_layers: int
    num_experts: int
    rows_LE: bytes              # float32, layer by layer

    def rows(self) -> npt.NDArray[np.float32]:
        """[L, E]"""
        return np.frombuffer(self.rows_LE, dtype=np.float32).reshape(self.num_layers, self.num_experts)

    @property
    def num_rows(self) -> float:
        """Return the rows of all layers."""
        return float(self.rows().sum(dtype=np.float64))


class ExpertLoadCounter:
    """Counts of one member. A row counts half after `half_life_s` seconds. Times come from one clock."""

    def __init__(self, num_layers: int, num_experts: int, half_life_s: float, now_s: float) -> None:
        self.num_steps = 0
        self._rows_LE = np.zeros((num_layers, num_experts))     # as they would count at _origin_s
        self._index_N = np.empty(0, dtype=np.int64)             # which expert each local slot is
        self._half_life_s = half_life_s
        self._origin_s = now_s

    def use(self, placement: Placement, rank: int) -> None:
        """Count the next steps by this placement, in which this member has that rank."""
        num_experts = self._rows_LE.shape[1]
        self._index_N = np.array([layer * num_experts + expert for layer in range(placement.num_layers)
                                  for expert in placement.experts_of(layer, rank)], dtype=np.int64)

    def add(self, expert_rows: Iterable[Iterable[int]], now_s: float) -> None:
        """Add the rows of one step, by layer and local slot (StepStats.expert_rows)."""
        self.num_steps += 1
        rows_N = np.fromiter(chain.from_iterable(expert_rows), np.float64, self._index_N.size)
        rows_N *= self._growth(now_s)
        self._rows_LE.reshape(-1)[self._index_N] += rows_N

    def snapshot(self, now_s: float) -> ExpertLoad:
        rows_LE = (self._rows_LE / self._growth(now_s)).astype(np.float32)
        num_layers, num_experts = rows_LE.shape
        return ExpertLoad(num_layers, num_experts, rows_LE.tobytes())

    def _growth(self, now_s: float) -> float:
        """Return what a row of now counts, where one of _origin_s counts 1: old counts need not be touched."""
        halvings = (now_s - self._origin_s) / self._half_life_s
        if halvings > _MAX_HALVINGS:
            self._rows_LE *= 0.5 ** halvings
            self._origin_s, halvings = now_s, 0.0
        return float(2.0 ** halvings)
