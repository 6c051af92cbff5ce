"""The placement of those that are left when members die: in milliseconds, without a solver. Pure, and without SciPy.

Streams wait for it, so it moves as little as it can; the planner's better one comes later, as a revision.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from cluster.planner.layer.error import PlacementError
from model.placement import ExpertRate, Placement
from serving.link.epoch import Epoch, Member, PlannedPlacement, RequestShare

_ALIKE = ExpertRate(1.0, 1.0)
Layer = list[tuple[int, ...]]       # of each expert its holders; () for one that nobody holds any more


@dataclass(frozen=True, slots=True)
class Room:
    """What survivors may take beside what they hold, by their new ranks."""

    bytes_M: tuple[int, ...]
    expert_bytes: int               # of one expert of one layer
    rows_per_expert: float = 1.0    # of a step, that speeds are compared for

    @property
    def slots_M(self) -> list[int]:
        return [max(0, one) // max(1, self.expert_bytes) for one in self.bytes_M]


def survivors(epoch: Epoch, gone: Collection[int]) -> tuple[Member, ...]:
    """Return who is left, in the order of the old ranks: the new ranks."""
    return tuple(member for rank, member in enumerate(epoch.members) if rank not in gone)


def placement_without(epoch: Epoch, gone: Collection[int], room: Room) -> PlannedPlacement:
    """Place the epoch's experts without the ranks that are gone. Raises PlacementError.

    Roles stay, shares are scaled to add up to 1, and copies stay where they are, unless memory is so short that a spare
    one has to make room. An expert that nobody holds goes where there is room, so that the slowest member of its layer
    is done early.
    """
    placement, left = epoch.placement, [rank for rank in range(len(epoch.members)) if rank not in gone]
    shares = scaled_shares([epoch.shares[rank] for rank in left])
    new_rank = {old: new for new, old in enumerate(left)}
    layers = _renumbered(placement, new_rank)
    rates = tuple(placement.rates[rank] for rank in left) if placement.rates else ()
    slots_M = room.slots_M
    lacking = sum(layer.count(()) for layer in layers) - sum(slots_M)
    if lacking > 0:
        lacking -= _drop_spares(layers, slots_M, lacking, rates or (_ALIKE,) * len(left))
    if lacking > 0:
        raise _too_small(survivors(epoch, gone), room, lacking)
    _give_out(layers, slots_M, rates or (_ALIKE,) * len(left), room.rows_per_expert)
    holders = tuple(map(tuple, layers))
    return PlannedPlacement(replace(placement, num_members=len(left), holders=holders, rates=rates), shares)


def scaled_shares(shares: Sequence[RequestShare]) -> tuple[RequestShare, ...]:
    """Return them so that they add up to 1. Raises PlacementError when nobody takes requests."""
    total = sum(share.fraction for share in shares)
    if not total:
        raise PlacementError("nobody who is left takes requests", fix="plan for them anew, with other roles")
    return tuple(replace(share, fraction=share.fraction / total) for share in shares)


def _renumbered(placement: Placement, new_rank: dict[int, int]) -> list[Layer]:
    different = {ranks for layer in placement.holders for ranks in layer}
    renumbered = {ranks: tuple(new_rank[rank] for rank in ranks if rank in new_rank) for ranks in different}
    return [[renumbered[ranks] for ranks in layer] for layer in placement.holders]


def _drop_spares(layers: list[Layer], slots_M: list[int], num_wanted: int, rates: Sequence[ExpertRate]) -> int:
    """Free up to so many slots by copies that others hold too, of the slowest members first. Return how many."""
    spare = sorted((position, layer) for layer, experts in enumerate(layers)
                   for position, ranks in enumerate(experts) if len(ranks) > 1)
    num_dropped = 0
    for expert, layer in spare:             # one of each layer before a second one of any
        while len(ranks := layers[layer][expert]) > 1 and num_dropped < num_wanted:
            slowest = max(ranks, key=lambda rank: (rates[rank].row_s, rank))
            layers[layer][expert] = tuple(rank for rank in ranks if rank != slowest)
            slots_M[slowest] += 1
            num_dropped += 1
    return num_dropped


def _give_out(layers: list[Layer], slots_M: list[int], rates: Sequence[ExpertRate], rows_per_expert: float) -> None:
    """Give every expert without a holder to one. `slots_M` are enough for all."""
    num_lost = sum(layer.count(()) for layer in layers)
    cost_M = [rate.seconds(rows_per_expert) for rate in rates]
    for layer in layers:
        lost = [expert for expert, ranks in enumerate(layer) if not ranks]
        if not lost:
            continue
        # Room is divided over the layers: a fast member whose room is used up early leaves the other layers slow.
        quota_M = [-(-slots * len(lost) // num_lost) for slots in slots_M]
        num_lost -= len(lost)
        done_s = [(seconds + cost_M[rank], rank) for rank, seconds in enumerate(_seconds(layer, rates, rows_per_expert))
                  if quota_M[rank]]
        heapq.heapify(done_s)
        for expert in lost:
            seconds, rank = heapq.heappop(done_s)
            layer[expert] = (rank,)
            quota_M[rank] -= 1
            slots_M[rank] -= 1
            if quota_M[rank]:
                heapq.heappush(done_s, (seconds + cost_M[rank], rank))


def _seconds(layer: Layer, rates: Sequence[ExpertRate], rows_per_expert: float) -> list[float]:
    """Return what a layer takes each member when all experts have as many rows."""
    seconds_M = [0.0] * len(rates)
    for ranks, count in Counter(layer).items():
        for rank in ranks:
            seconds_M[rank] += count * rates[rank].seconds(rows_per_expert / len(ranks))
    return seconds_M


def _too_small(members: Sequence[Member], room: Room, num_lacking: int) -> PlacementError:
    missing_bytes = num_lacking * room.expert_bytes
    lines = [f"the {len(members)} members that are left cannot hold the model: {missing_bytes} bytes are missing for "
             f"{num_lacking} experts of {room.expert_bytes} bytes that nobody holds any more"]
    lines += [f"member {member.node_name}: room for {max(0, num_bytes)} bytes"
              for member, num_bytes in zip(members, room.bytes_M, strict=True)]
    return PlacementError("\n".join(lines), fix=f"add a member with {missing_bytes} bytes free for experts, or raise "
                          "the memory budgets")
