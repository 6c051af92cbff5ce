"""Computes a gated DeltaNet layer step by step, by the verbs of any kernels: what runs where they have no faster way.

T rows of this step, D hidden size, C = query, key and value channels, H value heads, v value head size, J = 2 H
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.protocol import AttentionBatch, DeltaNetState, DeltaNetWeights, Kernels


class ComposedDeltaNet:
    """See DeltaNetBlock. The oracle of blocks that compute it at once."""

    def __init__(self, weights: DeltaNetWeights, kernels: Kernels) -> None:
        self._weights = weights
        self._kernels = kernels

    def __call__(self, x_TD: Tensor, batch: AttentionBatch, state: DeltaNetState) -> Tensor:
        kernels, weights, num_rows = self._kernels, self._weights, x_TD.shape[0]
        value_width = weights.num_value_heads * weights.value_head_dim
        widths = [weights.conv_weight_KC.shape[1], value_width, 2 * weights.num_value_heads]
        qkv_TC, z_TV, ba_TJ = torch.split(kernels.linear(x_TD, weights.projections), widths, dim=1)
        qkv_TC = kernels.causal_conv(qkv_TC, weights.conv_weight_KC, state, batch)
        out_THv = kernels.gated_delta_rule(qkv_TC, ba_TJ, weights.gates, state, batch)
        out_THv = kernels.gated_rms_norm(out_THv, z_TV.reshape(out_THv.shape), weights.norm_v, weights.eps)
        return kernels.linear(out_THv.reshape(num_rows, value_width), weights.out)
