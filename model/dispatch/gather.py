"""Dispatches by a gather: every member gets all rows and computes what its experts must. For small batches.

At most two collectives a layer: rows with their expert ids to everybody, expert outputs back. Nobody exchanges counts:
they follow from the agreed row counts and the gathered expert ids.
T tokens of this member, D hidden size, K experts per token, M members, S rows in a buffer,
W = D + columns that carry the expert ids
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.arrays import IdArray, IntArray
from model.dispatch.compiled_gather import compiled_gather_of
from model.dispatch.dispatcher import DispatchHandle
from model.dispatch.exchange import RowExchange, Scratch
from model.kernels.limits import MAX_GATHERED_ROWS
from model.kernels.protocol import ExpertWeights

_ID_BYTES = 2


class WireBuffer:
    """Holds rows [S, W] on the wire's device: each row, then its expert ids as raw int16."""

    def __init__(self, scratch: Scratch, num_rows: int, x_TD: Tensor, num_experts_per_token: int) -> None:
        hidden_size = x_TD.shape[1]
        id_columns = -(-num_experts_per_token * _ID_BYTES // x_TD.element_size())
        self.everything_SW = scratch.take(num_rows, hidden_size + id_columns, x_TD.dtype)
        self.rows_SD = self.everything_SW[:, :hidden_size]
        self.ids_SK = self.everything_SW[:, hidden_size:].view(torch.int16)[:, :num_experts_per_token]
        self._ids_view_SK: IdArray | None = self.ids_SK.numpy() if self.ids_SK.device.type == "cpu" else None

    def ids_on_host(self) -> IdArray:
        """Return the ids, valid until the next collective; wait for an accelerator."""
        return self.ids_SK.cpu().numpy() if self._ids_view_SK is None else self._ids_view_SK


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Holds the buffers of one step and views. C copies of this member's rows: one for each member, or one."""

    kind: tuple[int, torch.dtype, int]      # hidden size, dtype, experts per token
    sent: WireBuffer
    sent_rows_CTD: Tensor
    sent_ids_CTK: Tensor
    sent_padding_ids: Tensor
    received: WireBuffer


class GatherDispatcher:
    """See Dispatcher.

    fixed_shapes: one all_gather of everybody's rows padded to the largest count, as a CUDA graph wants it; the default
    on nccl. Otherwise rows go unpadded by one all_to_all: gloo's all_gather is a ring of M - 1 dependent hops and takes
    twice as long between 3 or 4 members.
    """

    def __init__(self, exchange: RowExchange, fixed_shapes: bool | None = None) -> None:
        self._exchange = exchange
        self._collectives = exchange.collectives
        self.fixed_shapes = self._collectives.uses_nccl if fixed_shapes is None else fixed_shapes
        self._sent = Scratch(self._collectives.wire_device)
        self._received = Scratch(self._collectives.wire_device)
        self._num_tokens_M: tuple[int, ...] = ()
        self._num_rows_M: list[int] = []        # rows that arrive from each member, padding included
        self._owner_S: IntArray = np.empty(0, dtype=np.int64)
        self._buffers: _Buffers | None = None   # of this step; its layers use them one after the other
        self._compiled = None if self.fixed_shapes else compiled_gather_of(exchange)

    @property
    def num_collectives(self) -> int:
        return self._collectives.num_collectives

    @property
    def bytes_sent(self) -> int:
        return self._collectives.bytes_sent

    def begin_step(self, num_tokens_of_member: tuple[int, ...]) -> None:
        self._exchange.begin_step(num_tokens_of_member)
        if num_tokens_of_member != self._num_tokens_M:
            self._num_tokens_M = num_tokens_of_member
            self._num_rows_M = list(num_tokens_of_member)
            if self.fixed_shapes:
                self._num_rows_M = [max(num_tokens_of_member)] * len(num_tokens_of_member)
            self._owner_S = np.repeat(np.arange(len(self._num_rows_M)), self._num_rows_M)
            self._buffers = None
            if self._compiled is not None:
                self._compiled.begin_step(num_tokens_of_member)

    def compute_at_once(self, layer: int, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor,
                     experts: ExpertWeights) -> tuple[Tensor, list[int]] | None:
        # With more rows calls cost nothing beside the work, and C would keep more memory.
        if (self._compiled is not None and self._exchange.travels(layer)
                and len(self._owner_S) <= MAX_GATHERED_ROWS):
            return self._compiled.compute(layer, x_TD, weights_TK, expert_ids_TK, experts)
        return self._exchange.compute_here(layer, x_TD, weights_TK, expert_ids_TK, experts)

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        exchange = self._exchange
        buffers = self._buffers_for(x_TD, expert_ids_TK.shape[1])
        buffers.sent_rows_CTD.copy_(x_TD)
        buffers.sent_ids_CTK.copy_(expert_ids_TK)
        sent_SW, received_SW = buffers.sent.everything_SW, buffers.received.everything_SW
        if self.fixed_shapes:
            buffers.sent_padding_ids.fill_(exchange.planners[layer].routing.padding_id)
            self._collectives.all_gather(received_SW, sent_SW)
        else:
            self._collectives.all_to_all(received_SW, sent_SW, self._num_rows_M,
                                         [x_TD.shape[0]] * exchange.num_members)
        plan = exchange.plan(layer, buffers.received.ids_on_host(), self._owner_S, self._num_rows_M)
        return exchange.arrive(buffers.received.rows_SD, plan.arrivals.source_row_R, plan)

    def combine(self, layer: int, rows_RD: Tensor, weights_TK: Tensor, handle: DispatchHandle) -> Tensor:
        return self._exchange.combine(rows_RD, weights_TK, handle)

    def _buffers_for(self, x_TD: Tensor, num_experts_per_token: int) -> _Buffers:
        kind = (x_TD.shape[1], x_TD.dtype, num_experts_per_token)
        if self._buffers is None or self._buffers.kind != kind:
            num_copies = 1 if self.fixed_shapes else self._exchange.num_members
            num_rows, num_tokens = self._num_rows_M[self._exchange.rank], x_TD.shape[0]
            sent = WireBuffer(self._sent, num_copies * num_rows, x_TD, num_experts_per_token)
            rows_CSD = sent.rows_SD.view(num_copies, num_rows, x_TD.shape[1])
            ids_CSK = sent.ids_SK.view(num_copies, num_rows, num_experts_per_token)
            self._buffers = _Buffers(
                kind, sent, rows_CSD[:, :num_tokens], ids_CSK[:, :num_tokens], ids_CSK[:, num_tokens:],
                WireBuffer(self._received, len(self._owner_S), x_TD, num_experts_per_token))
        return self._buffers
