"""Says how rows reach their experts and come back: the protocol, and the local reference, the oracle of the others.

T tokens of this member, D hidden size, K experts per token, E experts on this member (local slots),
R rows to be computed on this member, sorted by local slot
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.kernels.protocol import ExpertWeights, Kernels
from model.kernels.torch_kernels import sort_by_expert
from model.pace import UNTIMED, Pace
from model.placement import Placement


@dataclass(slots=True)
class DispatchHandle:
    """Holds what `combine` must know about the `dispatch` before it. Implementations add their transport's state."""

    num_rows_E: list[int]       # rows for each local expert slot, in slot order; adds up to R
    row_of_TK: Tensor           # int64 [T, K]: where token t's k-th expert output sits among the rows that come back


class Dispatcher(Protocol):
    """Brings rows to the members that hold their experts, and the experts' outputs back.

    Every member calls begin_step once a step, then for every MoE layer in the same order, with T = 0 too,
    compute_at_once, and dispatch and combine where that computed nothing. Raises GroupError when a collective fails.
    """

    @property
    def num_collectives(self) -> int:
        """Return how many collectives were run since construction."""

    @property
    def bytes_sent(self) -> int:
        """Return the payload that left this member since construction."""

    def begin_step(self, num_tokens_of_member: tuple[int, ...]) -> None:
        """Take the agreed row counts of the step, index = rank."""

    def compute_at_once(self, layer: int, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor,
                     experts: ExpertWeights) -> tuple[Tensor, list[int]] | None:
        """Compute a layer of this step with the experts of this member, where one call does it all -> (weighted sums
        [T, D], rows of each local slot). None, with nothing done: by dispatch and combine. Other members need not do
        the same."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        """Return the rows [R, D] for this member's experts, sorted by local slot. expert_ids int64, ascending along K.

        Only where compute_at_once has computed nothing.

        `layer` counts MoE layers only. D and the dtype of x are the same on all members, also where T = 0.
        """

    def combine(self, layer: int, rows_RD: Tensor, weights_TK: Tensor, handle: DispatchHandle) -> Tensor:
        """Turn expert outputs [R, D], in the order of `dispatch`, into weighted sums [T, D] of this member's tokens."""


def compute_experts(kernels: Kernels, pace: Pace, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor,
                    experts: ExpertWeights) -> tuple[Tensor, list[int]]:
    """Compute rows that stay. Nobody plans where they go; adding up is part of the work for experts here."""
    pace.begin_experts()
    pace.end_planning()
    computed = kernels.local_experts(x_TD, weights_TK, expert_ids_TK, experts)
    pace.end_experts()
    return computed


class LocalDispatcher:
    """Serves one member that holds every expert: rows are sorted, nothing travels. The others' oracle."""

    def __init__(self, kernels: Kernels, placement: Placement, pace: Pace = UNTIMED) -> None:
        if placement.num_members != 1:
            raise ValueError(f"LocalDispatcher serves one member, the placement has {placement.num_members}; "
                             "use AutoDispatcher")
        self.num_collectives = 0
        self.bytes_sent = 0
        self._kernels = kernels
        self._num_experts = [len(holders) for holders in placement.holders]
        self._pace = pace

    def begin_step(self, num_tokens_of_member: tuple[int, ...]) -> None:
        self._kernels.run_on(self._kernels.num_threads)

    def compute_at_once(self, layer: int, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor,
                     experts: ExpertWeights) -> tuple[Tensor, list[int]]:
        return compute_experts(self._kernels, self._pace, x_TD, weights_TK, expert_ids_TK, experts)

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        self._pace.begin_experts()
        num_experts_per_token = expert_ids_TK.shape[1]
        order_N, place_N, num_rows_E = sort_by_expert(expert_ids_TK.reshape(-1), self._num_experts[layer])
        self._pace.end_planning()
        rows_RD = x_TD[torch.div(order_N, num_experts_per_token, rounding_mode="floor")]
        return rows_RD, DispatchHandle(num_rows_E, place_N.view(-1, num_experts_per_token))

    def combine(self, layer: int, rows_RD: Tensor, weights_TK: Tensor, handle: DispatchHandle) -> Tensor:
        self._pace.end_experts()
        return self._kernels.combine(rows_RD, handle.row_of_TK, weights_TK)
