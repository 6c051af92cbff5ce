"""Plans which rows go to which member, and in what order their outputs come back. Pure: numpy, no collectives.

Every member computes these from the same facts, the expert ids of all rows, so sizes and orders need not be sent.
The oracle of model/kernels/row_plan.h, which computes the same in C, and what runs where that is not built.

M members of the group, E experts of the layer, T tokens of this member, K experts per token, S rows of all members,
R (row, expert) pairs computed here
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from model.arrays import BoolArray, FloatArray, IdArray, IntArray
from model.dispatch.row_split import LayerCopies, layer_copies, split_rows
from model.kernels.limits import MAX_EXPERTS
from model.placement import Placement

_LIKELY_ROWS = 10_000       # of each expert, owned by each member: many, so that all copies have a share


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """Describes a MoE layer as this member sees it. An expert with several copies has its first holder in the table."""

    rank: int
    num_members: int
    num_slots: int              # experts on this member
    padding_id: int             # an expert id that nobody computes: rows that only fill a fixed shape carry it
    holder_of_X: IdArray        # [E + 1] rank that computes an expert; num_members for padding
    slot_of_X: IdArray          # [E + 1] this member's slot for it; num_slots if it holds none, and for padding
    rank_EM: IdArray            # [E * M] 0, 1... M - 1 for every expert
    given_EM2: BoolArray        # [E * M * 2] False, True in turns
    copies: LayerCopies | None  # None: every expert has one holder


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Says what this member computes in a layer, and in which order it sends the outputs to the rows' owners."""

    num_rows_E: list[int]           # pairs for each local slot
    source_row_R: IntArray          # row of each pair, sorted by slot
    departure_R: IntArray           # the pairs in the order their outputs leave: by owner, then token, then expert
    num_departures_M: list[int]     # outputs for each owner


@dataclass(frozen=True, slots=True)
class Returns:
    """Says what comes back to this member for its own tokens: sorted by holder, then token, then expert."""

    row_of_TK: IntArray
    num_returns_M: list[int]        # outputs from each holder


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Holds all that a member plans for one layer of a step. The gather has no use for what follows `returns`."""

    arrivals: Arrivals
    returns: Returns
    token_S: IntArray               # own tokens to send, sorted by member and then token
    num_sent_M: list[int]
    place_R: IntArray               # of each pair's row among the rows that arrive
    num_received_M: list[int]


def layer_routing(placement: Placement, layer: int, rank: int) -> LayerRouting:
    """Return the tables of `layer` for the member `rank`. Raises ValueError when expert ids do not fit into 16 bits."""
    holders, num_members = placement.holders[layer], placement.num_members
    num_experts = len(holders)
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"layer {layer} has {num_experts} experts; the dispatchers carry ids up to {MAX_EXPERTS}")
    local = np.array(placement.experts_of(layer, rank), dtype=np.int64)
    slot_of_X = np.full(num_experts + 1, local.size, dtype=np.int16)
    slot_of_X[local] = np.arange(local.size)
    holder_of_X = np.array([*(ranks[0] for ranks in holders), num_members], dtype=np.int16)
    copied = any(len(ranks) > 1 for ranks in holders)
    return LayerRouting(
        rank, num_members, local.size, num_experts, holder_of_X, slot_of_X,
        np.tile(np.arange(num_members, dtype=np.int16), num_experts), np.tile([False, True], num_experts * num_members),
        layer_copies(holders, num_members, placement.rates) if copied else None)


def plan_rows(routing: LayerRouting, expert_ids_SK: IdArray, owner_S: IntArray, own: slice) -> RowPlan:
    """Plan for the rows of the group, sorted by owner and then token; `own` are this member's, without padding."""
    holder_SK = choose_holders(routing, expert_ids_SK, owner_S)
    token_S, num_sent_M = plan_sends(routing, holder_SK[own])
    place_S, num_received_M = plan_receipts(routing, holder_SK, owner_S)
    arrivals = plan_arrivals(routing, expert_ids_SK, holder_SK, owner_S)
    return RowPlan(arrivals, plan_returns(routing, holder_SK[own]), token_S, num_sent_M,
                   place_S.take(arrivals.source_row_R), num_received_M)


def choose_holders(routing: LayerRouting, expert_ids_SK: IdArray, owner_S: IntArray) -> IdArray:
    """Return the rank that computes each (row, expert) of the whole group [S, K]; num_members for padding.

    Rows are sorted by owner and then token. How many rows of an expert each holder computes is `split_rows`'s answer.
    Which ones: an owner that holds a copy keeps its own first rows, as many as it may compute; what is left, in order,
    fills what the holders may still compute, in the order of ranks.
    """
    if routing.copies is None:
        return routing.holder_of_X.take(expert_ids_SK)
    num_members, num_experts = routing.num_members, routing.padding_id
    id_N = expert_ids_SK.ravel()
    cell_N = id_N * np.int64(num_members) + owner_S.repeat(expert_ids_SK.shape[1])
    num_rows_EM = np.bincount(cell_N, minlength=(num_experts + 1) * num_members).reshape(-1, num_members)[:num_experts]
    quota_EM = split_rows(routing.copies, num_rows_EM.sum(axis=1))
    kept_EM = np.minimum(num_rows_EM, quota_EM)
    # In the order of experts, owners, tokens: an owner's rows of an expert, first those kept, then those given away.
    num_rows_EM2 = np.empty((*quota_EM.shape, 2), dtype=np.int64)
    num_rows_EM2[:, :, 0], num_rows_EM2[:, :, 1] = kept_EM, num_rows_EM - kept_EM
    given_P = routing.given_EM2.repeat(num_rows_EM2.ravel())
    holder_P = routing.rank_EM.repeat(num_rows_EM.ravel())
    holder_P[given_P] = routing.rank_EM.repeat((quota_EM - kept_EM).ravel())
    holder_N = np.full(id_N.size, num_members, dtype=np.int16)
    holder_N[id_N.argsort(kind="stable")[:holder_P.size]] = holder_P
    return holder_N.reshape(expert_ids_SK.shape)


def plan_arrivals(routing: LayerRouting, expert_ids_SK: IdArray | IntArray, holder_SK: IdArray,
                  owner_S: IntArray) -> Arrivals:
    """Plan the work of this member on its pairs among all rows, which are sorted by owner and then token."""
    pair_R = (holder_SK.ravel() == routing.rank).nonzero()[0]
    slot_R = routing.slot_of_X.take(expert_ids_SK.ravel().take(pair_R))
    order_R = slot_R.argsort(kind="stable")
    departure_R = np.empty_like(order_R)
    departure_R[order_R] = np.arange(order_R.size)
    row_R = pair_R // expert_ids_SK.shape[1]
    num_departures_M = np.bincount(owner_S.take(row_R), minlength=routing.num_members)
    num_rows_E = np.bincount(slot_R, minlength=routing.num_slots)
    return Arrivals(num_rows_E.tolist(), row_R.take(order_R), departure_R, num_departures_M.tolist())


def plan_returns(routing: LayerRouting, holder_TK: IdArray) -> Returns:
    """Plan what comes back for this member's own tokens."""
    holder_N = holder_TK.ravel()
    place_N = np.empty(holder_N.size, dtype=np.int64)
    place_N[holder_N.argsort(kind="stable")] = np.arange(holder_N.size)
    num_returns_M = np.bincount(holder_N, minlength=routing.num_members)
    return Returns(place_N.reshape(holder_TK.shape), num_returns_M.tolist())


def plan_sends(routing: LayerRouting, holder_TK: IdArray) -> tuple[IntArray, list[int]]:
    """Return the tokens to send, by member and then token, each at most once a member; and how many for each member."""
    num_tokens = len(holder_TK)
    needed_MT = np.zeros((routing.num_members, num_tokens), dtype=np.bool_)
    needed_MT[holder_TK, np.arange(num_tokens)[:, None]] = True
    return needed_MT.nonzero()[1], needed_MT.sum(axis=1).tolist()


def plan_receipts(routing: LayerRouting, holder_SK: IdArray, owner_S: IntArray) -> tuple[IntArray, list[int]]:
    """Plan what all the others' `plan_sends` bring here: the place of each row of the group among those that arrive (of
    no meaning for rows that do not), and how many arrive from each member.
    """
    arrives_S = (holder_SK == routing.rank).any(axis=1)
    return arrives_S.cumsum() - 1, np.bincount(owner_S[arrives_S], minlength=routing.num_members).tolist()


def expected_shares(routing: LayerRouting) -> FloatArray:
    """Return [owner, member]: the part of an owner's (row, expert) pairs that each member computes.

    Expected when all experts are equally likely and all members have equally many rows, and those many: the rows of
    an expert are then split as the members' rates allow.
    """
    num_members, num_experts = routing.num_members, routing.padding_id
    if routing.copies is None:
        row_M = np.bincount(routing.holder_of_X[:num_experts], minlength=num_members) / max(num_experts, 1)
        return np.tile(row_M, (num_members, 1))
    quota_EM = split_rows(routing.copies, np.full(num_experts, _LIKELY_ROWS * num_members))
    kept_EM = np.minimum(quota_EM, _LIKELY_ROWS)
    given_EM, left_EM = _LIKELY_ROWS - kept_EM, quota_EM - kept_EM
    # Whole rows, so that the sums are exact and the same on every CPU.
    taken_EMM = given_EM[:, :, None] * left_EM[:, None, :] // np.maximum(left_EM.sum(axis=1), 1)[:, None, None]
    rows_MM = taken_EMM.sum(axis=0) + np.diag(kept_EM.sum(axis=0))
    return np.asarray(rows_MM / (_LIKELY_ROWS * num_experts))


def reach_of(shares_MM: FloatArray, num_experts_per_token: int) -> list[float]:
    """Return how many other members a row of each owner must go to, as expected. The same on every CPU."""
    missed_MM = np.ones_like(shares_MM)
    for _ in range(num_experts_per_token):
        missed_MM = missed_MM * (1.0 - shares_MM)
    return [math.fsum(1.0 - missed for member, missed in enumerate(missed_M) if member != owner)
            for owner, missed_M in enumerate(missed_MM.tolist())]
