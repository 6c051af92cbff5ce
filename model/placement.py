"""Says as plain values which ranks hold a copy of which expert, in every MoE layer. Pure, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertRate:
    """Says what the rows of one expert cost a member. In the one regime its weights are read, in the other rows
    count."""

    read_s: float           # with one row: to read the expert's weights
    row_s: float            # of each row, when there are many
    start_s: float = 0.0    # then, besides all rows: what of the reading their computing does not hide

    def seconds(self, num_rows: float) -> float:
        return max(self.read_s, self.start_s + self.row_s * num_rows) if num_rows > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Placement:
    """Says who holds what: `holders[layer][expert]` = ascending ranks that hold a copy; every expert has at least one.

    `layer` counts MoE layers only (dense layers between them have no experts). Any rank may hold any number of experts,
    none included. `rates` by rank: what the split of an expert's rows over its copies goes by; empty: all alike.
    `collective_bytes`: what a member could send in the time that one collective less saves; None: not measured.
    """

    num_members: int
    holders: tuple[tuple[tuple[int, ...], ...], ...]
    rates: tuple[ExpertRate, ...] = ()
    collective_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.collective_bytes is not None and self.collective_bytes < 0:
            raise ValueError(f"collective_bytes={self.collective_bytes} is below zero; give None when it is not known")
        if self.rates and len(self.rates) != self.num_members:
            raise ValueError(f"{len(self.rates)} rates for {self.num_members} members; give each its own, or none")
        for rank, rate in enumerate(self.rates):
            if not (0 <= rate.start_s <= rate.read_s < math.inf and 0 < rate.row_s < math.inf):
                raise ValueError(f"rank {rank} has {rate}; times must be finite, row_s above zero, and start_s within "
                                 "read_s")
        for ranks in {ranks for layer in self.holders for ranks in layer}:      # few differ, and experts may be many
            if not ranks or list(ranks) != sorted(set(ranks)) or ranks[0] < 0 or ranks[-1] >= self.num_members:
                raise ValueError(self._whats_wrong_with(ranks))

    def _whats_wrong_with(self, ranks: tuple[int, ...]) -> str:
        layer, expert = next((layer, experts.index(ranks)) for layer, experts in enumerate(self.holders)
                             if ranks in experts)
        if not ranks:
            return f"layer {layer}: expert {expert} has no holder; give it at least one rank"
        return (f"layer {layer}: expert {expert} is held by {ranks}; ranks must ascend, without repeats, within "
                f"0..{self.num_members - 1}")

    @property
    def num_layers(self) -> int:
        return len(self.holders)

    def experts_of(self, layer: int, rank: int) -> tuple[int, ...]:
        """Return the ids of the experts that `rank` holds in `layer`, ascending: local slot i holds the i-th of
        them."""
        return tuple(expert for expert, ranks in enumerate(self.holders[layer]) if rank in ranks)

    def num_experts_of(self, rank: int) -> int:
        """Return how many expert copies `rank` holds, all layers together."""
        return sum(layer.count(ranks) for layer in self.holders for ranks in set(layer) if rank in ranks)
