"""Serves as a member without requests: experts for the others' rows and nothing else, so that its memory is theirs.

T rows of this step, always 0, D hidden size, V vocabulary
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from model.args import ModelArgs
from model.caches import SequenceCaches
from model.dispatch.dispatcher import Dispatcher
from model.kernels.protocol import AttentionBatch, Kernels
from model.moe import LocalExperts


class MemberModel(Protocol):
    """Says what a Runner needs of one member's weights: a Decoder, or an ExpertHost."""

    args: ModelArgs
    kernels: Kernels
    dtype: torch.dtype
    experts: list[LocalExperts]     # by MoE layer

    def forward(self, token_ids_T: Tensor, batch: AttentionBatch, caches: SequenceCaches,
                dispatcher: Dispatcher) -> Tensor:
        """Turn token ids, int64 [T] on the device, into hidden [T, D] after the last norm."""

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Turn hidden [S, D] from forward() into fp32 logits [S, V]."""

    @property
    def weights_bytes(self) -> int:
        """Return the bytes held by all weights of this member, in the kernels' layouts."""


class ExpertHost:
    """See MemberModel. `num_experts_of_layer`: local expert slots of each MoE layer."""

    def __init__(self, args: ModelArgs, kernels: Kernels, dtype: torch.dtype,
                 num_experts_of_layer: tuple[int, ...]) -> None:
        self.args = args
        self.kernels = kernels
        self.dtype = dtype
        self.experts = [LocalExperts(args, layer, num_experts, kernels, dtype)
                        for layer, num_experts in enumerate(num_experts_of_layer)]
        self._empty_0D = torch.empty(0, args.hidden_size, dtype=dtype, device=kernels.device)

    def forward(self, token_ids_T: Tensor, batch: AttentionBatch, caches: SequenceCaches,
                dispatcher: Dispatcher) -> Tensor:
        self._refuse(token_ids_T)
        for experts in self.experts:
            experts.serve_others(self._empty_0D, dispatcher)
        return self._empty_0D

    def logits(self, hidden_SD: Tensor) -> Tensor:
        self._refuse(hidden_SD)
        return torch.empty(0, self.args.vocab_size, device=self.kernels.device)

    def _refuse(self, rows: Tensor) -> None:
        if rows.shape[0]:
            raise ValueError(f"{rows.shape[0]} rows for a member that has experts only; give them to another one")

    @property
    def weights_bytes(self) -> int:
        return sum(experts.weights.nbytes for experts in self.experts)
