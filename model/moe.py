"""The feed-forward half of a layer: experts behind a gate, or one dense block.

T tokens of this member, D hidden size, K experts per token, R rows computed on this member
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.args import ModelArgs
from model.dispatch import Dispatcher
from model.gate import Gate
from model.kernels.protocol import Kernels


class SparseMlp:
    """One MoE layer with this member's share of its experts. `layer` counts MoE layers only."""

    def __init__(self, args: ModelArgs, layer: int, num_local_experts: int, kernels: Kernels,
                 dtype: torch.dtype) -> None:
        self.layer = layer
        self.gate = Gate(args, kernels, dtype)
        self.experts = kernels.new_experts(num_local_experts, args.moe_intermediate_size, args.hidden_size, dtype)
        self.num_rows_E: list[int] = [0] * num_local_experts     # of the last step
        self._kernels = kernels

    def forward(self, x_TD: Tensor, dispatcher: Dispatcher) -> Tensor:
        """x [T, D] -> [T, D]. T may be 0: then only the other members' rows are computed."""
        weights_TK, expert_ids_TK = self.gate.choose(x_TD)
        rows_RD, handle = dispatcher.dispatch(self.layer, x_TD, expert_ids_TK)
        self.num_rows_E = handle.num_rows_E
        rows_RD = self._kernels.experts(rows_RD, handle.num_rows_E, self.experts)
        return dispatcher.combine(self.layer, rows_RD, weights_TK, handle)

    @property
    def weights_bytes(self) -> int:
        return self.gate.weight.nbytes + self.experts.nbytes


class DenseMlp:
    """A SwiGLU block without a gate: one expert that takes every row, computed where the row is."""

    def __init__(self, args: ModelArgs, kernels: Kernels, dtype: torch.dtype) -> None:
        self.expert = kernels.new_experts(1, args.intermediate_size, args.hidden_size, dtype)
        self._kernels = kernels

    def forward(self, x_TD: Tensor) -> Tensor:
        return self._kernels.experts(x_TD, (x_TD.shape[0],), self.expert)

    @property
    def weights_bytes(self) -> int:
        return self.expert.nbytes
