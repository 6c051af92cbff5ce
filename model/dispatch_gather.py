"""Gather dispatch: every member gets all rows and computes what its experts must. For small batches.

At most two collectives a layer: rows with their expert ids to everybody, expert outputs back. Nobody exchanges counts:
they follow from the agreed row counts and the gathered expert ids.
T tokens of this member, D hidden size, K experts per token, M members, S rows in a buffer, W its width
"""

from __future__ import annotations

import numpy as np
import torch.distributed as dist
from torch import Tensor

from model.dispatch import DispatchHandle
from model.dispatch_collectives import Collectives
from model.dispatch_exchange import RowExchange
from model.dispatch_plan import Ints
from model.kernels.protocol import Kernels
from model.placement import Placement


class GatherDispatcher:
    """See Dispatcher.

    fixed_shapes: one all_gather of everybody's rows padded to the largest count, as a CUDA graph wants it; the default
    on nccl. Otherwise rows go unpadded by one all_to_all: gloo's all_gather is a ring of M - 1 dependent hops and takes
    1.7 times as long between 4 members.
    """

    def __init__(self, kernels: Kernels, placement: Placement, rank: int, group: dist.ProcessGroup,
                 fixed_shapes: bool | None = None) -> None:
        self._collectives = Collectives(group, rank, placement.num_members, kernels.device)
        self._exchange = RowExchange(kernels, placement, rank, self._collectives)
        self.fixed_shapes = self._collectives.uses_nccl if fixed_shapes is None else fixed_shapes
        self._num_rows_M: list[int] = []        # rows that arrive from each member, padding included
        self._owner_S: Ints = np.empty(0, dtype=np.int64)

    @property
    def num_collectives(self) -> int:
        return self._collectives.num_collectives

    @property
    def bytes_sent(self) -> int:
        return self._collectives.bytes_sent

    def begin_step(self, num_tokens_of_member: tuple[int, ...]) -> None:
        self._exchange.begin_step(num_tokens_of_member)
        self._num_rows_M = list(num_tokens_of_member)
        if self.fixed_shapes:
            self._num_rows_M = [max(num_tokens_of_member)] * len(num_tokens_of_member)
        self._owner_S = np.repeat(np.arange(len(self._num_rows_M)), self._num_rows_M)

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        exchange = self._exchange
        if not exchange.travels(layer):
            return exchange.stay(layer, x_TD, expert_ids_TK)
        (num_tokens, hidden_size), num_per_token = x_TD.shape, expert_ids_TK.shape[1]
        own_SW = exchange.new_buffer(self._num_rows_M[exchange.rank], x_TD, num_per_token)
        own_SW[:num_tokens, :hidden_size] = x_TD
        ids_in_buffer = exchange.ids_in(own_SW, hidden_size, num_per_token)
        ids_in_buffer[:num_tokens] = expert_ids_TK
        if num_tokens < len(own_SW):
            ids_in_buffer[num_tokens:] = exchange.routing[layer].padding_id

        gathered_SW = self._gather(own_SW)
        ids_SK = exchange.ids_in(gathered_SW, hidden_size, num_per_token).cpu().numpy()
        first = sum(self._num_rows_M[:exchange.rank])
        return exchange.arrive(layer, gathered_SW, self._owner_S, ids_SK, ids_SK[first:first + num_tokens], x_TD)

    def combine(self, layer: int, rows_RD: Tensor, weights_TK: Tensor, handle: DispatchHandle) -> Tensor:
        return self._exchange.combine(rows_RD, weights_TK, handle)

    def _gather(self, own_SW: Tensor) -> Tensor:
        gathered_SW = own_SW.new_empty(len(self._owner_S), own_SW.shape[1])
        if self.fixed_shapes:
            self._collectives.all_gather(gathered_SW, own_SW)
        else:
            num_members = self._exchange.num_members
            self._collectives.all_to_all(gathered_SW, own_SW.repeat(num_members, 1), self._num_rows_M,
                                         [len(own_SW)] * num_members)
        return gathered_SW
