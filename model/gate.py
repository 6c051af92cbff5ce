"""Chooses the experts that a token goes to, and their weights: the gate.

T tokens, D hidden size, K experts per token, N experts of the layer (everywhere, not this member's share)
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.args import ModelArgs
from model.kernels.protocol import Kernels


class Gate:
    def __init__(self, args: ModelArgs, kernels: Kernels, dtype: torch.dtype) -> None:
        self.weight = kernels.new_linear(args.num_experts, args.hidden_size, dtype)
        self._kernels = kernels
        self._num_experts_per_tok = args.num_experts_per_tok
        self._norm_topk_prob = args.norm_topk_prob
        self._rounds_weights = args.rounds_gate_weights

    def choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Choose for x [T, D] -> (weights fp32 [T, K], expert ids int64 [T, K]), each row ascending in expert id."""
        if not x_TD.shape[0]:
            return no_choice(self._num_experts_per_tok, x_TD.device)
        return self._kernels.choose_experts(x_TD, self.weight, self._num_experts_per_tok, self._norm_topk_prob,
                                            self._rounds_weights)


def no_choice(num_experts_per_tok: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what `Gate.choose` answers for T = 0."""
    no_ids_0K = torch.empty(0, num_experts_per_tok, dtype=torch.int64, device=device)
    return no_ids_0K.float(), no_ids_0K
