"""Runs a layer of a gather in one call in C (gathered_experts.h): for CPU members whose rows the transport carries.

The same rows travel, and the same bits come back, as with model/dispatch/gather.py, so a group may mix both.
T tokens of this member, D hidden size, K experts per token, M members, S rows of all members
"""

from __future__ import annotations

import ctypes
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from model.arrays import IntArray
from model.dispatch.compiled_row_planner import CompiledRowPlanner, foreign_ids
from model.dispatch.exchange import RowExchange
from model.kernels.packed_cpu import PackedCpuKernels
from model.kernels.packed_rows import BAD_ID, EXCHANGE_FAILED, check, rows_of
from model.kernels.packed_weights import PackedExperts
from model.kernels.protocol import ExpertWeights
from model.transport.group import TransportGroup

_NS = 1e-9


class CompiledGather:
    """Made by `compiled_gather_of`. Counts its collectives with the others of the exchange."""

    def __init__(self, exchange: RowExchange, kernels: PackedCpuKernels, group: TransportGroup,
                 planners: list[CompiledRowPlanner]) -> None:
        self._exchange = exchange
        self._group = group
        self._planners = planners
        self._library, self._num_threads = kernels.library, kernels.num_threads     # experts: see HostThreads
        self._gathered_experts = self._library.long.packed_gathered_experts
        self._num_tokens = 0
        self._arrays: tuple[IntArray, IntArray]     # the struct points into them
        self.begin_step((0,) * exchange.num_members)

    def begin_step(self, num_tokens_of_member: tuple[int, ...]) -> None:
        rank = self._exchange.rank
        num_tokens_M = np.array(num_tokens_of_member, dtype=np.int64)
        owner_S = np.repeat(np.arange(len(num_tokens_M)), num_tokens_M)
        self._arrays = (num_tokens_M, owner_S)
        self._num_tokens = num_tokens_of_member[rank]
        self._step = self._library.new_struct(
            "GatherStep", **self._group.exchange_call(), num_tokens=num_tokens_M.ctypes.data, owner=owner_S.ctypes.data,
            num_rows=len(owner_S), own_first=sum(num_tokens_of_member[:rank]), own_count=self._num_tokens, failure=0,
            failed_rank=0, bytes_sent=0, sent_ns=0, arrived_ns=0, planned_ns=0, left_ns=0, returned_ns=0)
        self._address = ctypes.addressof(self._step)

    def compute(self, layer: int, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor,
                experts: ExpertWeights) -> tuple[Tensor, list[int]]:
        """See Dispatcher.compute_at_once."""
        planner = self._planners[layer]
        (num_tokens, hidden_size), num_choices = x_TD.shape, expert_ids_TK.shape[1]
        assert isinstance(experts, PackedExperts) and x_TD.dtype is experts.dtype
        assert experts.num_experts == planner.routing.num_slots and hidden_size == experts.hidden_size
        assert num_tokens == self._num_tokens and weights_TK.shape == expert_ids_TK.shape == (num_tokens, num_choices)
        assert expert_ids_TK.dtype is torch.int64 and weights_TK.dtype is torch.float32
        x_TD, step_bytes = rows_of(x_TD)
        weights_TK, expert_ids_TK = weights_TK.contiguous(), expert_ids_TK.contiguous()
        out_TD = torch.empty((num_tokens, hidden_size), dtype=x_TD.dtype)
        counts_E = experts.counts()
        status = self._gathered_experts(
            self._address, planner.address, experts.address, x_TD.data_ptr(), step_bytes, num_choices,
            weights_TK.data_ptr(), expert_ids_TK.data_ptr(), out_TD.data_ptr(), ctypes.addressof(counts_E),
            self._num_threads)
        if status:
            self._raise(status, planner)
        step = self._step
        self._exchange.pace.exchanged(step.sent_ns * _NS, step.arrived_ns * _NS, step.planned_ns * _NS,
                                      step.left_ns * _NS, step.returned_ns * _NS)
        self._exchange.collectives.count(2, step.bytes_sent)
        return out_TD, counts_E[:]

    def _raise(self, status: int, planner: CompiledRowPlanner) -> NoReturn:
        if status == EXCHANGE_FAILED:
            error = self._group.error_of(self._step.failure, self._step.failed_rank)
            raise self._exchange.collectives.failed("gather", error) from error
        if status == BAD_ID:
            raise foreign_ids(planner.routing)
        check(status)
        raise AssertionError(f"status {status}")


def compiled_gather_of(exchange: RowExchange) -> CompiledGather | None:
    """Return what computes layers of this exchange in one call; None where rows are carried by something else, kernels
    are not these, or the member is made to wait between collectives."""
    kernels, group = exchange.kernels, exchange.collectives.transport
    planners = [planner for planner in exchange.planners if isinstance(planner, CompiledRowPlanner)]
    if (group is None or not isinstance(kernels, PackedCpuKernels) or len(planners) < len(exchange.planners)
            or not exchange.pace.is_passing_time):
        return None
    return CompiledGather(exchange, kernels, group, planners)
