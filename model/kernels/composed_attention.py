"""Computes a layer's attention step by step, by the verbs of any kernels: what runs where they have no faster way.

T rows of this step, D hidden size, H query heads, G key/value heads, d head size, J = (H + 2 G) d,
and H d more where the output has a gate
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.protocol import AttentionBatch, AttentionWeights, Kernels


class ComposedAttention:
    """See AttentionBlock. The oracle of blocks that compute it at once."""

    def __init__(self, weights: AttentionWeights, kernels: Kernels) -> None:
        self._weights = weights
        self._kernels = kernels

    def __call__(self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], batch: AttentionBatch, cache: Tensor) -> Tensor:
        kernels, weights, num_rows = self._kernels, self._weights, x_TD.shape[0]
        q_width, kv_width = weights.num_heads * weights.head_dim, weights.num_kv_heads * weights.head_dim
        qkv_TJ = kernels.linear(x_TD, weights.qkv, weights.qkv_bias_J)
        q_TJ, k_TJ, v_TJ, gate_TJ = torch.split(
            qkv_TJ, [q_width, kv_width, kv_width, q_width * weights.is_gated], dim=1)
        q_THd = self._normed(q_TJ.reshape(num_rows, weights.num_heads, weights.head_dim), weights.q_norm_d)
        k_TGd = self._normed(k_TJ.reshape(num_rows, weights.num_kv_heads, weights.head_dim), weights.k_norm_d)
        v_TGd = v_TJ.reshape(num_rows, weights.num_kv_heads, weights.head_dim)
        kernels.write_kv(cache, kernels.rope(k_TGd, *cos_sin), v_TGd, batch)
        out_THd = kernels.attention(kernels.rope(q_THd, *cos_sin), cache, batch, weights.scale, weights.sliding_window)
        out_TJ = out_THd.reshape(num_rows, q_width)
        if weights.is_gated:
            out_TJ = kernels.times_sigmoid(out_TJ, gate_TJ)
        return kernels.linear(out_TJ, weights.out, weights.out_bias_D)

    def _normed(self, x_THd: Tensor, weight_d: Tensor | None) -> Tensor:
        return x_THd if weight_d is None else self._kernels.rms_norm(x_THd, weight_d, self._weights.eps)
