"""Computes in plain torch, for any device: the oracle of the packed kernels, and what CUDA runs.

On the CPU every row's result is independent of the rows beside it, which torch alone does not promise:
* GEMMs run on tiles of a fixed number of rows, because by that number MKL and oneDNN choose how they add up;
* exp and silu run on pieces that torch neither splits over threads nor ends with scalar code, because its vector and
  scalar code differ in the last bit;
* attention goes over key blocks of fixed places.
On CUDA attention is torch's scaled_dot_product_attention and nothing is promised between different batches.

Letters as in model/kernels/protocol.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from model.kernels.composed_attention import ComposedAttention
from model.kernels.composed_delta_net import ComposedDeltaNet
from model.kernels.pieces import in_pieces, linear_in_tiles
from model.kernels.protocol import (
    AttentionBatch,
    AttentionWeights,
    DeltaNetGates,
    DeltaNetState,
    DeltaNetWeights,
    ExpertWeights,
    LinearWeight,
)
from model.kernels.torch_attention import attend_in_blocks, attend_with_sdpa
from model.kernels.torch_delta_net import causal_conv, gated_delta_rule

_VOCABULARY_PIECE = 4096


class TorchLinear:
    """Holds a weight [N, K] as torch stores it."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.out_features = out_features
        self.in_features = in_features
        self.weight_NK = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.nbytes = self.weight_NK.nbytes

    def load_rows(self, first_row: int, weight_nK: Tensor) -> None:
        self.weight_NK[first_row:first_row + weight_nK.shape[0]].copy_(weight_nK)


class TorchExperts:
    """Holds gate and up fused [E, 2I, D], down [E, D, I]."""

    def __init__(self, num_experts: int, intermediate_size: int, hidden_size: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        self.num_experts = num_experts
        self.intermediate_size = intermediate_size
        self.gate_up_EiD = torch.empty(num_experts, 2 * intermediate_size, hidden_size, dtype=dtype, device=device)
        self.down_EDI = torch.empty(num_experts, hidden_size, intermediate_size, dtype=dtype, device=device)
        self.nbytes = self.gate_up_EiD.nbytes + self.down_EDI.nbytes

    def load_gate(self, slot: int, weight_ID: Tensor) -> None:
        self.gate_up_EiD[slot, :self.intermediate_size].copy_(weight_ID)

    def load_up(self, slot: int, weight_ID: Tensor) -> None:
        self.gate_up_EiD[slot, self.intermediate_size:].copy_(weight_ID)

    def load_down(self, slot: int, weight_DI: Tensor) -> None:
        self.down_EDI[slot].copy_(weight_DI)

    def copy_slot(self, slot: int, source: ExpertWeights, source_slot: int) -> None:
        assert isinstance(source, TorchExperts)
        self.gate_up_EiD[slot].copy_(source.gate_up_EiD[source_slot])
        self.down_EDI[slot].copy_(source.down_EDI[source_slot])


class TorchKernels:
    """Implements the Kernels protocol (model/kernels/protocol.py), where every method is described."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.name = f"torch-{self.device.type}"
        self.kv_block_dim = 1
        self._on_cpu = self.device.type == "cpu"
        self._slots_of: tuple[AttentionBatch, Tensor] | None = None

    @property
    def num_threads(self) -> int:
        return torch.get_num_threads()

    def run_on(self, num_threads: int) -> None:
        """Change nothing: torch's threads wait by spinning, so more of them cost whoever computes beside them."""

    def on_one_thread(self) -> TorchKernels:
        return self             # torch counts them for each thread: whoever gives way sets its own

    def new_linear(self, out_features: int, in_features: int, dtype: torch.dtype) -> TorchLinear:
        return TorchLinear(out_features, in_features, dtype, self.device)

    def linear(self, x_TK: Tensor, weight: LinearWeight, bias_N: Tensor | None = None,
               out_dtype: torch.dtype | None = None) -> Tensor:
        assert isinstance(weight, TorchLinear)
        out_dtype = out_dtype or x_TK.dtype
        if out_dtype == x_TK.dtype:
            return self._matmul(x_TK, weight.weight_NK, bias_N)
        if not self._on_cpu and bias_N is None:
            return torch.mm(x_TK, weight.weight_NK.t(), out_dtype=out_dtype)
        pieces = torch.split(weight.weight_NK, _VOCABULARY_PIECE)
        y_TN = torch.cat([self._matmul(x_TK.to(out_dtype), piece_nK.to(out_dtype)) for piece_nK in pieces], dim=1)
        return y_TN if bias_N is None else y_TN + bias_N.to(out_dtype)

    def _matmul(self, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        multiply = linear_in_tiles if self._on_cpu else functional.linear
        return multiply(x_TK, weight_NK, bias_N)

    def new_experts(self, num_experts: int, intermediate_size: int, hidden_size: int,
                    dtype: torch.dtype) -> TorchExperts:
        return TorchExperts(num_experts, intermediate_size, hidden_size, dtype, self.device)

    def experts(self, rows_RD: Tensor, num_rows_E: Sequence[int], weights: ExpertWeights) -> Tensor:
        assert isinstance(weights, TorchExperts)
        out_RD = torch.empty_like(rows_RD)
        first = 0
        for slot, num_rows in enumerate(num_rows_E):
            if num_rows:
                rows_nD = rows_RD[first:first + num_rows]
                gate_nI, up_nI = self._matmul(rows_nD, weights.gate_up_EiD[slot]).chunk(2, dim=1)
                act_nI = (self._map(functional.silu, gate_nI.float()) * up_nI.float()).to(rows_RD.dtype)
                out_RD[first:first + num_rows] = self._matmul(act_nI, weights.down_EDI[slot])
                first += num_rows
        return out_RD

    def _map(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return in_pieces(function, x) if self._on_cpu else function(x)

    def choose_experts(self, x_TD: Tensor, weight: LinearWeight, num_choices: int, normalizes: bool,
                       rounds: bool) -> tuple[Tensor, Tensor]:
        probs_TN = torch.softmax(self.linear(x_TD, weight), dim=-1, dtype=torch.float32)
        # Not topk: which of equally likely experts it takes is not defined.
        sorted_TN, ids_TN = torch.sort(probs_TN, dim=-1, descending=True, stable=True)
        weights_TK, ids_TK = sorted_TN[:, :num_choices], ids_TN[:, :num_choices]
        if normalizes:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        if rounds and x_TD.dtype != torch.float32:
            weights_TK = weights_TK.to(x_TD.dtype).float()
        ids_TK, order_TK = torch.sort(ids_TK, dim=-1)
        return weights_TK.gather(1, order_TK), ids_TK

    def local_experts(self, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor,
                      experts: ExpertWeights) -> tuple[Tensor, list[int]]:
        order_N, place_N, num_rows_E = sort_by_expert(expert_ids_TK.reshape(-1), experts.num_experts)
        rows_RD = x_TD[torch.div(order_N, expert_ids_TK.shape[1], rounding_mode="floor")]
        outputs_RD = self.experts(rows_RD, num_rows_E, experts)
        return self.combine(outputs_RD, place_N.view(expert_ids_TK.shape), weights_TK), num_rows_E

    def add_shared_expert(self, sum_TD: Tensor, x_TD: Tensor, expert: ExpertWeights, gate: LinearWeight) -> Tensor:
        out_TD = self.experts(x_TD, (x_TD.shape[0],), expert)
        return sum_TD + self.times_sigmoid(out_TD, self.linear(x_TD, gate))

    def combine(self, rows_RD: Tensor, row_of_TK: Tensor, weights_TK: Tensor) -> Tensor:
        total_TD = torch.zeros(row_of_TK.shape[0], rows_RD.shape[1], dtype=torch.float32, device=rows_RD.device)
        for k in range(row_of_TK.shape[1]):
            total_TD += rows_RD[row_of_TK[:, k]].float() * weights_TK[:, k:k + 1]
        return total_TD.to(rows_RD.dtype)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = x_TD.float().contiguous()
        normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
        return (weight_D * normed.to(weight_D.dtype)).to(x_TD.dtype)

    def add_rms_norm(self, x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        sum_TD = x_TD + delta_TD
        return sum_TD, self.rms_norm(sum_TD, weight_D, eps)

    def gated_rms_norm(self, x_THd: Tensor, gate_THd: Tensor, weight_d: Tensor, eps: float) -> Tensor:
        normed = self.rms_norm(x_THd, weight_d, eps).float()
        return (normed * self._map(functional.silu, gate_THd.float())).to(x_THd.dtype)

    def times_sigmoid(self, x_TN: Tensor, gate_TN: Tensor) -> Tensor:
        return (x_TN.float() * self._map(torch.sigmoid, gate_TN.float())).to(x_TN.dtype)

    def new_delta_net_states(self, num_layers: int, num_slots: int, num_value_heads: int, key_head_dim: int,
                             value_head_dim: int, conv_kernel_size: int, conv_width: int,
                             dtype: torch.dtype) -> list[DeltaNetState]:
        return [DeltaNetState(
            torch.zeros(num_slots, num_value_heads, key_head_dim, value_head_dim, device=self.device),
            torch.zeros(num_slots, conv_kernel_size - 1, conv_width, dtype=dtype, device=self.device))
            for _ in range(num_layers)]

    def causal_conv(self, x_TC: Tensor, weight_KC: Tensor, state: DeltaNetState, batch: AttentionBatch) -> Tensor:
        return causal_conv(x_TC, weight_KC, state.conv_NcC, batch, self._map)

    def gated_delta_rule(self, qkv_TC: Tensor, ba_TJ: Tensor, gates: DeltaNetGates, state: DeltaNetState,
                         batch: AttentionBatch) -> Tensor:
        _, num_heads, key_dim, value_dim = state.recurrent_NHkv.shape
        key_width = (qkv_TC.shape[1] - num_heads * value_dim) // 2
        q_TC, k_TC, v_TC = torch.split(qkv_TC.float(), [key_width, key_width, num_heads * value_dim], dim=1)
        b_TH, a_TH = ba_TJ.float().chunk(2, dim=1)
        softplus_TH = self._map(functional.softplus, a_TH + gates.bias_H)
        out_THv = gated_delta_rule(
            _of_value_heads(q_TC, key_dim, num_heads), _of_value_heads(k_TC, key_dim, num_heads),
            v_TC.reshape(-1, num_heads, value_dim), self._map(torch.exp, gates.rate_H * softplus_TH),
            self._map(torch.sigmoid, b_TH), state.recurrent_NHkv, batch)
        return out_THv.to(qkv_TC.dtype)

    def new_attention_block(self, weights: AttentionWeights) -> ComposedAttention:
        return ComposedAttention(weights, self)

    def new_delta_net_block(self, weights: DeltaNetWeights) -> ComposedDeltaNet:
        return ComposedDeltaNet(weights, self)

    def rope(self, x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        rotary_dim = cos_Td.shape[1]
        x = x_THd[..., :rotary_dim].float()
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        rotated = (x * cos_Td.unsqueeze(1) + turned * sin_Td.unsqueeze(1)).to(x_THd.dtype)
        return rotated if rotary_dim == x_THd.shape[-1] else torch.cat((rotated, x_THd[..., rotary_dim:]), dim=-1)

    def new_kv_cache(self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int,
                     dtype: torch.dtype) -> Tensor:
        """Return [layers, key or value, blocks, B, G, d]."""
        return torch.zeros(num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim, dtype=dtype,
                           device=self.device)

    def write_kv(self, cache: Tensor, k_TGd: Tensor, v_TGd: Tensor, batch: AttentionBatch) -> None:
        slots_T = self._slots(batch)
        cache[0].flatten(0, 1).index_copy_(0, slots_T, k_TGd)
        cache[1].flatten(0, 1).index_copy_(0, slots_T, v_TGd)

    def _slots(self, batch: AttentionBatch) -> Tensor:
        """Return slots_T on the device, sent once a step instead of once a layer."""
        if self._slots_of is None or self._slots_of[0] is not batch:
            self._slots_of = (batch, batch.slots_T.to(self.device))
        return self._slots_of[1]

    def attention(self, q_THd: Tensor, cache: Tensor, batch: AttentionBatch, scale: float,
                  sliding_window: int | None) -> Tensor:
        attend = attend_in_blocks if self._on_cpu else attend_with_sdpa
        return attend(q_THd, cache, batch, scale, sliding_window)


def _of_value_heads(x_TC: Tensor, key_dim: int, num_heads: int) -> Tensor:
    """[T, key heads * k] -> [T, H, k]: each key head serves as many value heads, one after the other."""
    x_Tgk = x_TC.reshape(x_TC.shape[0], -1, key_dim)
    return x_Tgk.repeat_interleave(num_heads // x_Tgk.shape[1], dim=1)


def sort_by_expert(expert_ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Sort N expert ids, stably -> (order [N], place of each in that order [N], count of each expert).

    The count is the one host synchronization of a layer on an accelerator.
    """
    order_N = torch.argsort(expert_ids_N, stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    counts_E: list[int] = torch.bincount(expert_ids_N, minlength=num_experts).tolist()
    return order_N, place_N, counts_E
