"""Ragged all-to-all dispatch: a row goes once to each member that holds any of its experts. For large batches.

At most three collectives a layer: counts, rows with their expert ids, expert outputs back.
T tokens of this member, D hidden size, K experts per token, M members, S rows in a buffer, W its width
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.dispatch import DispatchHandle
from model.dispatch_collectives import Collectives
from model.dispatch_exchange import RowExchange, WireBuffer
from model.dispatch_plan import plan_sends
from model.kernels.protocol import Kernels
from model.pace import Pace
from model.placement import Placement


class AllToAllDispatcher:
    """See Dispatcher. Sends the least rows, and must exchange their counts first."""

    def __init__(self, kernels: Kernels, placement: Placement, rank: int, group: dist.ProcessGroup) -> None:
        self._collectives = Collectives(group, rank, placement.num_members, kernels.device)
        self._exchange = RowExchange(kernels, placement, rank, self._collectives)

    def keep_pace(self, pace: Pace) -> None:
        self._collectives.pace = pace

    @property
    def num_collectives(self) -> int:
        return self._collectives.num_collectives

    @property
    def bytes_sent(self) -> int:
        return self._collectives.bytes_sent

    def begin_step(self, num_tokens_of_member: tuple[int, ...]) -> None:
        self._exchange.begin_step(num_tokens_of_member)

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        exchange = self._exchange
        if not exchange.travels(layer):
            return exchange.stay(layer, x_TD, expert_ids_TK)
        num_per_token = expert_ids_TK.shape[1]
        own_ids_TK = expert_ids_TK.cpu().numpy()
        token_S, num_sent_M = plan_sends(exchange.routing[layer], own_ids_TK, exchange.rank)
        num_received_M = self._exchange_counts(num_sent_M)

        sent = WireBuffer(exchange.sent, len(token_S), x_TD, num_per_token)
        tokens = torch.from_numpy(token_S).to(x_TD.device)
        sent.rows_SD.copy_(x_TD.index_select(0, tokens))
        sent.ids_SK.copy_(expert_ids_TK.index_select(0, tokens))
        received = WireBuffer(exchange.received, sum(num_received_M), x_TD, num_per_token)
        self._collectives.all_to_all(received.everything_SW, sent.everything_SW, num_received_M, num_sent_M)

        owner_S = np.repeat(np.arange(exchange.num_members), num_received_M)
        return exchange.arrive(layer, received, owner_S, received.ids_on_host(), own_ids_TK)

    def combine(self, layer: int, rows_RD: Tensor, weights_TK: Tensor, handle: DispatchHandle) -> Tensor:
        return self._exchange.combine(rows_RD, weights_TK, handle)

    def _exchange_counts(self, num_sent_M: list[int]) -> list[int]:
        sent_M1 = torch.tensor(num_sent_M, device=self._collectives.wire_device).view(-1, 1)
        received_M1 = torch.empty_like(sent_M1)
        one_each = [1] * len(num_sent_M)
        self._collectives.all_to_all(received_M1, sent_M1, one_each, one_each)
        num_received_M: list[int] = received_M1.view(-1).tolist()
        return num_received_M
