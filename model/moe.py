"""Computes the feed-forward half of a layer: experts behind a gate, or one dense block.

T tokens of this member, D hidden size, K experts per token, R rows computed on this member
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.args import ModelArgs
from model.dispatch.dispatcher import Dispatcher
from model.gate import Gate, no_choice
from model.kernels.protocol import ExpertWeights, Kernels


class LocalExperts:
    """Holds this member's share of the experts of one MoE layer: they compute rows for anybody.

    `layer` counts MoE layers only. Another placement brings other `weights`.
    """

    def __init__(self, args: ModelArgs, layer: int, num_local_experts: int, kernels: Kernels,
                 dtype: torch.dtype) -> None:
        self.layer = layer
        self.weights = new_experts(args, num_local_experts, kernels, dtype)
        self.num_rows_E: list[int] = [0] * num_local_experts     # of the last step
        self._no_choice = no_choice(args.num_experts_per_tok, kernels.device)
        self._kernels = kernels

    def forward(self, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor, dispatcher: Dispatcher) -> Tensor:
        """Turn x [T, D] and the gate's choice into [T, D]."""
        computed = dispatcher.compute_at_once(self.layer, x_TD, weights_TK, expert_ids_TK, self.weights)
        if computed is not None:
            out_TD, self.num_rows_E = computed
            return out_TD
        rows_RD, handle = dispatcher.dispatch(self.layer, x_TD, expert_ids_TK)
        self.num_rows_E = handle.num_rows_E
        rows_RD = self._kernels.experts(rows_RD, handle.num_rows_E, self.weights)
        return dispatcher.combine(self.layer, rows_RD, weights_TK, handle)

    def serve_others(self, empty_0D: Tensor, dispatcher: Dispatcher) -> None:
        """Compute the others' rows, with none of its own."""
        self.forward(empty_0D, *self._no_choice, dispatcher)


def new_experts(args: ModelArgs, num_local_experts: int, kernels: Kernels, dtype: torch.dtype) -> ExpertWeights:
    """Return empty slots for experts of a MoE layer."""
    return kernels.new_experts(num_local_experts, args.moe_intermediate_size, args.hidden_size, dtype)


class SparseMlp:
    """Computes a MoE layer by the gate and this member's share of the experts. `layer` counts MoE layers only."""

    def __init__(self, args: ModelArgs, layer: int, num_local_experts: int, kernels: Kernels,
                 dtype: torch.dtype) -> None:
        self.gate = Gate(args, kernels, dtype)
        self.experts = LocalExperts(args, layer, num_local_experts, kernels, dtype)
        self.shared = SharedExpert(args, kernels, dtype) if args.shared_expert_size else None

    def forward(self, x_TD: Tensor, dispatcher: Dispatcher) -> Tensor:
        """Turn x [T, D] into [T, D]."""
        weights_TK, expert_ids_TK = self.gate.choose(x_TD)
        out_TD = self.experts.forward(x_TD, weights_TK, expert_ids_TK, dispatcher)
        return out_TD if self.shared is None else self.shared.add_to(out_TD, x_TD)

    @property
    def weights_bytes(self) -> int:
        shared_bytes = 0 if self.shared is None else self.shared.weights_bytes
        return self.gate.weight.nbytes + self.experts.weights.nbytes + shared_bytes


class SharedExpert:
    """The expert that takes every row, times sigmoid of a gate of its own. It is computed where the row is."""

    def __init__(self, args: ModelArgs, kernels: Kernels, dtype: torch.dtype) -> None:
        self.expert = kernels.new_experts(1, args.shared_expert_size, args.hidden_size, dtype)
        self.gate = kernels.new_linear(1, args.hidden_size, dtype)
        self._kernels = kernels

    def add_to(self, sum_TD: Tensor, x_TD: Tensor) -> Tensor:
        """Add what it makes of x [T, D] to what the other experts made of it."""
        return self._kernels.add_shared_expert(sum_TD, x_TD, self.expert, self.gate)

    @property
    def weights_bytes(self) -> int:
        return self.expert.nbytes + self.gate.nbytes


class DenseMlp:
    """Computes a SwiGLU block without a gate: one expert that takes every row, where the row is."""

    def __init__(self, args: ModelArgs, kernels: Kernels, dtype: torch.dtype) -> None:
        self.expert = kernels.new_experts(1, args.intermediate_size, args.hidden_size, dtype)
        self._kernels = kernels

    def forward(self, x_TD: Tensor) -> Tensor:
        return self._kernels.experts(x_TD, (x_TD.shape[0],), self.expert)

    @property
    def weights_bytes(self) -> int:
        return self.expert.nbytes
