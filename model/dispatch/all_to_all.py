"""Dispatches by a ragged all-to-all: a row goes once to each member that holds any of its experts. For large batches.

At most three collectives a layer: the expert ids of all rows to everybody, rows, expert outputs back. The ids cost a
member 2 K bytes for each of its rows and each other member. From them every member knows how the rows of an expert are
split over its copies, what it gets and what it returns, so rows travel without ids and nobody exchanges counts.
T tokens of this member, D hidden size, K experts per token, M members, S rows of all members
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.arrays import IdArray, IntArray
from model.dispatch.dispatcher import DispatchHandle
from model.dispatch.exchange import RowExchange, Scratch, pick_rows
from model.kernels.protocol import ExpertWeights


class AllToAllDispatcher:
    """See Dispatcher. Sends the least rows, and must exchange their expert ids first."""

    def __init__(self, exchange: RowExchange) -> None:
        self._exchange = exchange
        self._collectives = exchange.collectives
        self._sent_ids = Scratch(self._collectives.wire_device)
        self._received_ids = Scratch(self._collectives.wire_device)
        self._num_tokens_M: list[int] = []
        self._owner_S: IntArray = np.empty(0, dtype=np.int64)

    @property
    def num_collectives(self) -> int:
        return self._collectives.num_collectives

    @property
    def bytes_sent(self) -> int:
        return self._collectives.bytes_sent

    def begin_step(self, num_tokens_of_member: tuple[int, ...]) -> None:
        self._exchange.begin_step(num_tokens_of_member)
        if list(num_tokens_of_member) != self._num_tokens_M:
            self._num_tokens_M = list(num_tokens_of_member)
            self._owner_S = np.repeat(np.arange(len(num_tokens_of_member)), num_tokens_of_member)

    def compute_at_once(self, layer: int, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor,
                     experts: ExpertWeights) -> tuple[Tensor, list[int]] | None:
        return self._exchange.compute_here(layer, x_TD, weights_TK, expert_ids_TK, experts)

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        exchange = self._exchange
        plan = exchange.plan(layer, self._exchange_ids(expert_ids_TK), self._owner_S, self._num_tokens_M)
        sent_SD = exchange.sent.take(len(plan.token_S), x_TD.shape[1], x_TD.dtype)
        received_SD = exchange.received.take(sum(plan.num_received_M), x_TD.shape[1], x_TD.dtype)
        pick_rows(x_TD, torch.from_numpy(plan.token_S).to(x_TD.device), sent_SD)
        self._collectives.all_to_all(received_SD, sent_SD, plan.num_received_M, plan.num_sent_M)
        return exchange.arrive(received_SD, plan.place_R, plan)

    def combine(self, layer: int, rows_RD: Tensor, weights_TK: Tensor, handle: DispatchHandle) -> Tensor:
        return self._exchange.combine(rows_RD, weights_TK, handle)

    def _exchange_ids(self, expert_ids_TK: Tensor) -> IdArray:
        """Return everybody's expert ids [S, K], on the host."""
        num_tokens, num_per_token = expert_ids_TK.shape
        num_members = self._exchange.num_members
        sent = self._sent_ids.take(num_members * num_tokens, num_per_token, torch.int16)
        received_SK = self._received_ids.take(len(self._owner_S), num_per_token, torch.int16)
        sent.view(num_members, num_tokens, num_per_token).copy_(expert_ids_TK)
        self._collectives.all_to_all(received_SK, sent, self._num_tokens_M, [num_tokens] * num_members)
        ids_SK: IdArray = received_SK.cpu().numpy()
        return ids_SK
