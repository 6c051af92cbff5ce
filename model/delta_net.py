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
from model.kernels.protocol import AttentionBatch, DeltaNetGates, DeltaNetState, Kernels


class GatedDeltaNet:
    """One layer. q, k, v, z (the gate of the output), b and a are one fused weight, in this order."""

    def __init__(self, args: ModelArgs, kernels: Kernels, dtype: torch.dtype) -> None:
        assert args.linear is not None
        self.sizes: LinearAttentionArgs = args.linear
        num_heads, device = self.sizes.num_value_heads, kernels.device
        self._widths = [self.sizes.conv_width, self.sizes.value_width, 2 * num_heads]
        self.projections = kernels.new_linear(sum(self._widths), args.hidden_size, dtype)
        self.conv_weight_KC = torch.zeros(self.sizes.conv_kernel_size, self.sizes.conv_width, dtype=dtype,
                                          device=device)
        self.gates = DeltaNetGates(torch.zeros(num_heads, device=device), torch.zeros(num_heads, device=device))
        self.norm_v = torch.ones(self.sizes.value_head_dim, dtype=dtype, device=device)
        self.out = kernels.new_linear(args.hidden_size, self.sizes.value_width, dtype)
        self._eps = args.rms_norm_eps
        self._kernels = kernels

    def forward(self, x_TD: Tensor, batch: AttentionBatch, state: DeltaNetState) -> Tensor:
        """x [T, D] -> [T, D]. Goes on from the sequences' states and writes what they become to other slots."""
        kernels, num_rows = self._kernels, x_TD.shape[0]
        qkv_TC, z_TV, ba_TJ = torch.split(kernels.linear(x_TD, self.projections), self._widths, dim=1)
        qkv_TC = kernels.causal_conv(qkv_TC, self.conv_weight_KC, state, batch)
        out_THv = kernels.gated_delta_rule(qkv_TC, ba_TJ, self.gates, state, batch)
        out_THv = kernels.gated_rms_norm(out_THv, z_TV.reshape(out_THv.shape), self.norm_v, self._eps)
        return kernels.linear(out_THv.reshape(num_rows, self.sizes.value_width), self.out)

    @property
    def weights_bytes(self) -> int:
        return (self.projections.nbytes + self.out.nbytes + self.conv_weight_KC.nbytes + self.norm_v.nbytes
                + self.gates.rate_H.nbytes + self.gates.bias_H.nbytes)
