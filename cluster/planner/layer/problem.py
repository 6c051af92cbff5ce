"""One MoE layer: the problem and the solution. Pure.

E experts, M members. A copy is one (expert, member) pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.planner.layer.error import PlacementError
from model.arrays import BoolArray, FloatArray

Holders = tuple[tuple[int, ...], ...]       # of each expert of a layer, ascending ranks
Split = tuple[tuple[float, ...], ...]       # of each expert's rows, a fraction for each of its holders


@dataclass(frozen=True, slots=True)
class LayerProblem:
    """Place the experts of one layer so that the slowest member is done first. Raises PlacementError."""

    costs_EM: FloatArray                    # seconds that member m takes for all rows of expert e in a step
    slots_M: tuple[int, ...]                # copies that a member can hold
    min_copies: int = 1                     # members that every expert is on, at least
    previous: Holders | None = None         # who holds them now; () for an expert that nobody holds any more

    def __post_init__(self) -> None:
        _check_costs(self.costs_EM)
        num_experts, num_members = self.costs_EM.shape
        if len(self.slots_M) != num_members:
            raise PlacementError(f"{len(self.slots_M)} slots for {num_members} members",
                                 fix="give a number of slots for every member")
        if self.min_copies < 1 or (self.min_copies > num_members and num_experts):
            raise PlacementError(f"min_copies={self.min_copies} with {num_members} members: copies of an expert are on "
                                 "different members", fix=f"set min_copies to 1..{num_members}, or add members")
        room = sum(max(0, min(slots, num_experts)) for slots in self.slots_M)
        if room < num_experts * self.min_copies:
            raise PlacementError(f"{num_experts} experts in {self.min_copies} copies need "
                                 f"{num_experts * self.min_copies} slots, the members have {room}",
                                 fix="give the members more memory, add members, or lower min_copies")
        if self.previous is not None:
            _check_previous(self.previous, num_experts, num_members)

    @property
    def room_M(self) -> NDArray[np.int64]:
        """The slots that can be of use: one copy of every expert is all that a member can hold."""
        return np.clip(np.array(self.slots_M, dtype=np.int64), 0, self.costs_EM.shape[0])

    def previous_EM(self) -> BoolArray:
        """Return True where a copy is now."""
        return holders_mask(self.previous or ((),) * len(self.costs_EM), self.costs_EM.shape[1])

    def num_lost(self) -> int:
        """Return the copies that must be loaded at the very least so that every expert has min_copies holders."""
        held_EM = self.previous_EM()
        lacking = int(np.maximum(0, self.min_copies - held_EM.sum(axis=1)).sum())
        kept = int(np.minimum(held_EM.sum(axis=0), self.room_M).sum())
        return max(lacking, len(held_EM) * self.min_copies - kept)


@dataclass(frozen=True, slots=True)
class LayerSolution:
    """The placement of one layer."""

    holders: Holders
    split: Split                            # who is expected to compute how much of each expert's rows
    step_s: float                           # of the slowest member
    bound_s: float                          # no placement in these slots is faster
    num_moved: int                          # copies to be loaded that `previous` has not


def holders_mask(holders: Holders, num_members: int) -> BoolArray:
    held_EM = np.zeros((len(holders), num_members), dtype=np.bool_)
    for expert, ranks in enumerate(holders):
        held_EM[expert, list(ranks)] = True
    return held_EM


def split_matrix(holders: Holders, split: Split, num_members: int) -> FloatArray:
    """Return fraction_EM, the part of each expert's rows that each member computes."""
    fraction_EM = np.zeros((len(holders), num_members))
    for expert, (ranks, parts) in enumerate(zip(holders, split, strict=True)):
        fraction_EM[expert, list(ranks)] = parts
    return fraction_EM


def mask_holders(held_EM: BoolArray) -> Holders:
    return tuple(tuple(np.flatnonzero(held_M).tolist()) for held_M in held_EM)


def _check_costs(costs_EM: FloatArray) -> None:
    if costs_EM.ndim != 2 or not costs_EM.shape[1]:
        raise PlacementError(f"costs have shape {costs_EM.shape}", fix="give seconds as [experts, members]")
    wrong = np.argwhere(~np.isfinite(costs_EM) | (costs_EM < 0))
    if len(wrong):
        expert, member = wrong[0].tolist()
        raise PlacementError(f"expert {expert} costs member {member} {costs_EM[expert, member]} seconds",
                             fix="costs must be finite and not below zero; measure that member again")


def _check_previous(previous: Holders, num_experts: int, num_members: int) -> None:
    if len(previous) != num_experts:
        raise PlacementError(f"the previous placement has {len(previous)} experts, the layer {num_experts}",
                             fix="give the placement of the same model, or none")
    for expert, ranks in enumerate(previous):
        if list(ranks) != sorted(set(ranks)) or (ranks and not 0 <= ranks[0] <= ranks[-1] < num_members):
            raise PlacementError(f"the previous placement has expert {expert} on members {ranks}, there are "
                                 f"{num_members}", fix="take away the members that left, and renumber the others")
