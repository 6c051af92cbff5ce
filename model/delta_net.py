"""Gated DeltaNet: linear attention whose state forgets by a gate and is corrected by the delta rule.

Yang, Kautz, Hatamizadeh: Gated Delta Networks (2024); as transformers' Qwen3NextGatedDeltaNet and
Qwen3_5MoeGatedDeltaNet.

T rows of this step, D hidden size, K convolution kernel size, C = query, key and value channels, H value heads, v value
head size, J = C + H v + 2 H
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.args import LinearAttentionArgs, ModelArgs
from model.kernels.protocol import AttentionBatch, DeltaNetGates, DeltaNetState, DeltaNetWeights, Kernels


class GatedDeltaNet:
    """One layer. q, k, v, z (the gate of the output), b and a are one fused weight, in this order."""

    def __init__(self, args: ModelArgs, kernels: Kernels, dtype: torch.dtype) -> None:
        assert args.linear is not None
        self.sizes: LinearAttentionArgs = args.linear
        num_heads, device = self.sizes.num_value_heads, kernels.device
        width = self.sizes.conv_width + self.sizes.value_width + 2 * num_heads
        self.projections = kernels.new_linear(width, args.hidden_size, dtype)
        self.conv_weight_KC = torch.zeros(self.sizes.conv_kernel_size, self.sizes.conv_width, dtype=dtype,
                                          device=device)
        self.gates = DeltaNetGates(torch.zeros(num_heads, device=device), torch.zeros(num_heads, device=device))
        self.norm_v = torch.ones(self.sizes.value_head_dim, dtype=dtype, device=device)
        self.out = kernels.new_linear(args.hidden_size, self.sizes.value_width, dtype)
        self._block = kernels.new_delta_net_block(DeltaNetWeights(
            self.projections, self.out, self.conv_weight_KC, self.gates, self.norm_v, self.sizes.num_key_heads,
            num_heads, self.sizes.key_head_dim, self.sizes.value_head_dim, args.rms_norm_eps))

    def forward(self, x_TD: Tensor, batch: AttentionBatch, state: DeltaNetState) -> Tensor:
        """x [T, D] -> [T, D]. Goes on from the sequences' states and writes what they become to other slots."""
        return self._block(x_TD, batch, state)

    @property
    def weights_bytes(self) -> int:
        return (self.projections.nbytes + self.out.nbytes + self.conv_weight_KC.nbytes + self.norm_v.nbytes
                + self.gates.rate_H.nbytes + self.gates.bias_H.nbytes)
