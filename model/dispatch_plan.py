"""Which rows go to which member, and in what order their outputs come back. Pure: numpy, no torch, no collectives.

Every member computes these from the same agreed facts, so sizes and orders need not be sent.

M members of the group, E experts of the layer, T tokens of this member, K experts per token, S rows that arrived here,
R (row, expert) pairs computed here
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.expert_copies import choose_copies
from model.placement import Placement

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int16]

MAX_EXPERTS = 32_767        # ids travel as int16


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """One MoE layer as this member sees it."""

    num_slots: int          # experts on this member
    padding_id: int         # an expert id that nobody computes: rows that only fill a fixed shape carry it
    holder_of_ME: Ids       # [M, E] rank that computes expert e for the rows of owner m
    slot_of_MX: Ids         # [M, E + 1] this member's slot for it; num_slots if computed elsewhere, and for padding

    def reach(self, owner: int, num_experts_per_token: int) -> float:
        """Expected number of other members that one row of `owner` must go to, were all experts equally likely."""
        num_members, num_experts = self.holder_of_ME.shape
        shares_M = np.bincount(self.holder_of_ME[owner], minlength=num_members) / max(num_experts, 1)
        return float((1.0 - (1.0 - np.delete(shares_M, owner)) ** num_experts_per_token).sum())


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What this member computes in a layer, and the order in which it sends the outputs to the rows' owners."""

    num_rows_E: list[int]           # pairs for each local slot
    source_row_R: Ints              # arrived row of each pair, sorted by slot
    departure_R: Ints               # the pairs in the order their outputs leave: by owner, then token, then expert
    num_departures_M: list[int]     # outputs for each owner


@dataclass(frozen=True, slots=True)
class Returns:
    """What comes back to this member for its own tokens: sorted by holder, then token, then expert."""

    row_of_TK: Ints
    num_returns_M: list[int]        # outputs from each holder


def layer_routing(placement: Placement, layer: int, rank: int) -> LayerRouting:
    """Tables of `layer` for the member `rank`. Raises ValueError when expert ids do not fit into 16 bits."""
    holders = placement.holders[layer]
    num_experts = len(holders)
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"layer {layer} has {num_experts} experts; the dispatchers carry ids up to {MAX_EXPERTS}")
    local = np.array(placement.experts_of(layer, rank), dtype=np.int64)
    holder_of_ME = np.array([choose_copies(holders, owner) for owner in range(placement.num_members)], dtype=np.int16)
    slot_of_X = np.full(num_experts + 1, local.size, dtype=np.int16)
    slot_of_X[local] = np.arange(local.size)
    slot_of_MX = np.full((placement.num_members, num_experts + 1), local.size, dtype=np.int16)
    slot_of_MX[:, :num_experts] = np.where(holder_of_ME == rank, slot_of_X[:num_experts], local.size)
    return LayerRouting(local.size, num_experts, holder_of_ME, slot_of_MX)


def plan_arrivals(routing: LayerRouting, expert_ids_SK: Ids | Ints, owner_S: Ints) -> Arrivals:
    """Plan the work of this member on rows that arrived, sorted by owner and then token."""
    num_members, num_columns = routing.slot_of_MX.shape
    num_rows, num_per_row = expert_ids_SK.shape
    slot_N = routing.slot_of_MX.ravel().take((owner_S * num_columns)[:, None] + expert_ids_SK).ravel()
    num_rows_E = np.bincount(slot_N, minlength=routing.num_slots + 1)[:routing.num_slots]
    num_pairs = int(num_rows_E.sum())
    pair_R = slot_N.argsort(kind="stable")[:num_pairs]
    place_N = np.empty(num_rows * num_per_row, dtype=np.int64)
    place_N[pair_R] = np.arange(num_pairs)
    source_row_R = pair_R // num_per_row
    num_departures_M = np.bincount(owner_S.take(source_row_R), minlength=num_members)
    return Arrivals(num_rows_E.tolist(), source_row_R, place_N[slot_N < routing.num_slots], num_departures_M.tolist())


def plan_returns(routing: LayerRouting, expert_ids_TK: Ids | Ints, rank: int) -> Returns:
    """Plan what comes back for this member's own tokens."""
    holder_N = routing.holder_of_ME[rank].take(expert_ids_TK.ravel())
    place_N = np.empty(holder_N.size, dtype=np.int64)
    place_N[holder_N.argsort(kind="stable")] = np.arange(holder_N.size)
    num_returns_M = np.bincount(holder_N, minlength=len(routing.holder_of_ME))
    return Returns(place_N.reshape(expert_ids_TK.shape), num_returns_M.tolist())


def plan_sends(routing: LayerRouting, expert_ids_TK: Ids | Ints, rank: int) -> tuple[Ints, list[int]]:
    """Tokens to send, sorted by member and then token, each at most once a member; and their number for each member."""
    num_members, num_tokens = len(routing.holder_of_ME), len(expert_ids_TK)
    needed_MT = np.zeros((num_members, num_tokens), dtype=np.bool_)
    holder_TK = routing.holder_of_ME[rank].take(expert_ids_TK)
    needed_MT[holder_TK, np.arange(num_tokens)[:, None]] = True
    return needed_MT.nonzero()[1], needed_MT.sum(axis=1).tolist()
