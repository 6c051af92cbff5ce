"""Chooses the dispatcher of each step by a cost rule on agreed numbers, so that all members choose alike.

The gather saves one collective, the exchange of expert ids; the all-to-all saves rows that members get without need. In
a step, the member that would send the most such rows decides:

    gather  <=>  max over owners of (rows gathered - reach * rows owned) * row bytes  <=  collective_bytes

where reach is the expected number of other members that a row of that owner must go to when experts are equally
likely under the placement, and collective_bytes is what moves in the time of one small collective: the placement says
it when the members' links are known.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from model.dispatch.all_to_all import AllToAllDispatcher
from model.dispatch.dispatcher import Dispatcher, DispatchHandle
from model.dispatch.exchange import RowExchange
from model.dispatch.gather import GatherDispatcher
from model.dispatch.row_plan import expected_shares, reach_of
from model.kernels.protocol import ExpertWeights

# Before links are measured. Of a library (Gloo, NCCL), from benchmarks/results/2026-11-23_dispatch_epyc-milan-2c.md; of
# the transport, from the times of 4 KB, 64 KB and 1 MB in 2026-11-28_transport_epyc-turin-2c.md.
LIBRARY_COLLECTIVE_BYTES, TRANSPORT_COLLECTIVE_BYTES = 1 << 20, 64 << 10


def prefers_gather(num_tokens_of_member: tuple[int, ...], reach_of_member: tuple[float, ...], row_bytes: int,
                   fixed_shapes: bool, collective_bytes: int) -> bool:
    """Return whether the cost rule above says gather. Pure. With fixed shapes every member sends as many rows as the
    one that has the most."""
    others = len(num_tokens_of_member) - 1
    most = max(num_tokens_of_member)
    wasted_rows = max(others * (most if fixed_shapes else num_tokens) - reach * num_tokens
                      for num_tokens, reach in zip(num_tokens_of_member, reach_of_member, strict=True))
    return wasted_rows * row_bytes <= collective_bytes


class AutoDispatcher:
    """See Dispatcher. `mode` forces one of the two; `gather_max_rows` replaces the cost rule by a bound on all rows."""

    def __init__(self, exchange: RowExchange, mode: Literal["auto", "all_to_all", "gather"] = "auto",
                 gather_max_rows: int | None = None) -> None:
        self._exchange = exchange
        self._collectives = exchange.collectives
        self._all_to_all = AllToAllDispatcher(exchange)
        self._gather = GatherDispatcher(exchange)
        self._mode = mode
        self._gather_max_rows = gather_max_rows
        measured_bytes = exchange.placement.collective_bytes
        unmeasured_bytes = (LIBRARY_COLLECTIVE_BYTES if self._collectives.transport is None
                            else TRANSPORT_COLLECTIVE_BYTES)
        self._collective_bytes = unmeasured_bytes if measured_bytes is None else measured_bytes
        # Known before the first step, which is not to wait for it.
        self._shares_LMM = [expected_shares(planner.routing) for planner in exchange.planners]
        self._num_tokens_M: tuple[int, ...] = ()
        self._reach_of_K: dict[int, tuple[float, ...]] = {}
        self._chosen: Dispatcher | None = None      # None: the step's first layer has not chosen yet

    @property
    def num_collectives(self) -> int:
        return self._collectives.num_collectives

    @property
    def bytes_sent(self) -> int:
        return self._collectives.bytes_sent

    def begin_step(self, num_tokens_of_member: tuple[int, ...]) -> None:
        self._exchange.begin_step(num_tokens_of_member)
        self._num_tokens_M = num_tokens_of_member
        self._chosen = None

    def compute_at_once(self, layer: int, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor,
                     experts: ExpertWeights) -> tuple[Tensor, list[int]] | None:
        if not self._exchange.travels(layer):
            return self._exchange.compute_here(layer, x_TD, weights_TK, expert_ids_TK, experts)
        return self._of_step(x_TD, expert_ids_TK).compute_at_once(layer, x_TD, weights_TK, expert_ids_TK, experts)

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        return self._of_step(x_TD, expert_ids_TK).dispatch(layer, x_TD, expert_ids_TK)

    def combine(self, layer: int, rows_RD: Tensor, weights_TK: Tensor, handle: DispatchHandle) -> Tensor:
        assert self._chosen is not None
        return self._chosen.combine(layer, rows_RD, weights_TK, handle)

    def _of_step(self, x_TD: Tensor, expert_ids_TK: Tensor) -> Dispatcher:
        if self._chosen is None:
            self._chosen = self._choose(x_TD.shape[1] * x_TD.element_size(), expert_ids_TK.shape[1])
            self._chosen.begin_step(self._num_tokens_M)
        return self._chosen

    def _choose(self, row_bytes: int, num_experts_per_token: int) -> Dispatcher:
        if self._mode != "auto":
            return self._gather if self._mode == "gather" else self._all_to_all
        if self._gather_max_rows is not None:
            return self._gather if sum(self._num_tokens_M) <= self._gather_max_rows else self._all_to_all
        reach = self._reach_of_K.get(num_experts_per_token)
        if reach is None:
            reach = self._reach_of_K[num_experts_per_token] = self._mean_reach(num_experts_per_token)
        gather = prefers_gather(self._num_tokens_M, reach, row_bytes, self._gather.fixed_shapes, self._collective_bytes)
        return self._gather if gather else self._all_to_all

    def _mean_reach(self, num_experts_per_token: int) -> tuple[float, ...]:
        """Return the reach of each owner, averaged over the layers."""
        reaches = [reach_of(shares_MM, num_experts_per_token) for shares_MM in self._shares_LMM]
        return tuple(math.fsum(reach) / len(reaches) for reach in zip(*reaches, strict=True))
