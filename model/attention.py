"""Computes grouped-query attention over the paged KV cache.

T rows of this step, D hidden size, H query heads, G key/value heads, d head size, J = (H + 2 G) d,
and H d more where the output has a gate
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.args import ModelArgs
from model.kernels.protocol import AttentionBatch, AttentionWeights, Kernels


def new_norm(args: ModelArgs, size: int, kernels: Kernels, dtype: torch.dtype) -> Tensor:
    """Return the weight of an RMS norm: one that is centred at zero is kept in fp32, the 1 added."""
    return torch.ones(size, dtype=torch.float32 if args.zero_centered_norms else dtype, device=kernels.device)


class PagedAttention:
    """Computes one layer's attention. q, k, v and, if there is one, the gate of the output are one fused weight."""

    def __init__(self, args: ModelArgs, kernels: Kernels, dtype: torch.dtype) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = args.num_heads, args.num_kv_heads, args.head_dim
        self.q_width, self.kv_width = args.num_heads * args.head_dim, args.num_kv_heads * args.head_dim
        self.gate_width = self.q_width if args.gated_attention else 0
        qkv_width = self.q_width + 2 * self.kv_width + self.gate_width
        self.qkv = kernels.new_linear(qkv_width, args.hidden_size, dtype)
        self.out = kernels.new_linear(args.hidden_size, self.q_width, dtype)
        self.qkv_bias_J, self.out_bias_D = (
            torch.zeros(width, dtype=dtype, device=kernels.device) if has_bias else None
            for width, has_bias in ((qkv_width, args.qkv_bias), (args.hidden_size, args.out_bias)))
        self.q_norm_d, self.k_norm_d = (
            new_norm(args, args.head_dim, kernels, dtype) if args.qk_norm else None for _ in range(2))
        self._block = kernels.new_attention_block(AttentionWeights(
            self.qkv, self.out, self.qkv_bias_J, self.out_bias_D, self.q_norm_d, self.k_norm_d, self.num_heads,
            self.num_kv_heads, self.head_dim, args.gated_attention, args.sliding_window, args.rms_norm_eps))

    def forward(self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], batch: AttentionBatch, cache: Tensor) -> Tensor:
        """Write the rows' keys and values to `cache`, this layer's slice, then attend."""
        return self._block(x_TD, cos_sin, batch, cache)

    @property
    def weights_bytes(self) -> int:
        optional = (self.qkv_bias_J, self.out_bias_D, self.q_norm_d, self.k_norm_d)
        return self.qkv.nbytes + self.out.nbytes + sum(weight.nbytes for weight in optional if weight is not None)
