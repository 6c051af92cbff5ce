"""Runs kernels in C on packed weights, for CPUs (packed_cpu.c and its headers say how).

Every output element is one fp32 FMA chain in ascending k, so a row's result does not depend on the rows beside it, on
threads, or on the CPU's instructions. Runs on threads of a pool of its own, one call at a time: a call from a second
Python thread meanwhile runs on that thread alone. Torch is to have one thread beside it (select.py): those that it has
wait by spinning.

Letters as in model/kernels/protocol.py
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from model.kernels.call_threads import CallThreads
from model.kernels.limits import BLOCK_SIZES, MAX_HEAD_DIM, fits_block
from model.kernels.packed_blocks import AttentionSteps, PackedAttention, PackedMoe
from model.kernels.packed_cpu_library import KernelLibrary
from model.kernels.packed_delta_net import PackedDeltaNet, PackedDeltaNetBlock, new_delta_net_states
from model.kernels.packed_rows import DTYPE_CODES, DTYPE_SIZES, check, rows_of
from model.kernels.packed_weights import PackedExperts, PackedLinear
from model.kernels.protocol import (
    AttentionBatch,
    AttentionWeights,
    DeltaNetGates,
    DeltaNetState,
    DeltaNetWeights,
    ExpertWeights,
    LinearWeight,
)

_NO_WINDOW = 1 << 40


class PackedCpuKernels:
    """Implements the Kernels protocol (model/kernels/protocol.py), where every method is described.

    Raises KernelLibraryError (an OSError) when no library fits this CPU.
    """

    def __init__(self, num_threads: int) -> None:
        """`num_threads`: that a call runs on, the caller's included."""
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads}: kernels run on one thread at least")
        self.name = "packed-cpu"
        self.kv_block_dim = 0
        self.device = torch.device("cpu")
        self._threads = threads = CallThreads(num_threads)
        self.library = KernelLibrary()
        short, long = self.library.short, self.library.long
        self._rms_norm, self._rope, self._combine = short.packed_rms_norm, short.packed_rope, short.packed_combine
        self._write_kv = short.packed_write_kv
        self._add_rms_norm = short.packed_add_rms_norm
        self._times_sigmoid, self._delta_net = short.packed_times_sigmoid, PackedDeltaNet(self.library, threads)
        self._moe, self._attention_steps = PackedMoe(self.library, threads), AttentionSteps(self.library)
        self.choose_experts, self.local_experts = self._moe.choose_experts, self._moe.local_experts
        self.add_shared_expert = self._moe.add_shared_expert
        self._linear, self._experts, self._attention = long.packed_linear, long.packed_experts, long.packed_attention

    @property
    def num_threads(self) -> int:
        return self._threads.own

    def run_on(self, num_threads: int) -> None:
        self._threads.now = num_threads

    def on_one_thread(self) -> PackedCpuKernels:
        return PackedCpuKernels(1)

    def new_linear(self, out_features: int, in_features: int, dtype: torch.dtype) -> PackedLinear:
        return PackedLinear(out_features, in_features, dtype, self.library, self.num_threads)

    def linear(self, x_TK: Tensor, weight: LinearWeight, bias_N: Tensor | None = None,
               out_dtype: torch.dtype | None = None) -> Tensor:
        num_rows, in_features = x_TK.shape
        assert isinstance(weight, PackedLinear) and x_TK.dtype is weight.dtype and in_features == weight.in_features
        out_dtype = out_dtype or weight.dtype
        assert out_dtype is weight.dtype or out_dtype is torch.float32
        assert bias_N is None or (bias_N.dtype is weight.dtype and bias_N.is_contiguous())
        x_TK, step = rows_of(x_TK)
        out_TN = torch.empty((num_rows, weight.out_features), dtype=out_dtype)
        self._linear(weight.address, x_TK.data_ptr(), step, num_rows, None if bias_N is None else bias_N.data_ptr(),
                     out_TN.data_ptr(), DTYPE_CODES[out_dtype], self._threads.now)
        return out_TN

    def new_experts(self, num_experts: int, intermediate_size: int, hidden_size: int,
                    dtype: torch.dtype) -> PackedExperts:
        return PackedExperts(num_experts, intermediate_size, hidden_size, dtype, self.library, self.num_threads)

    def experts(self, rows_RD: Tensor, num_rows_E: Sequence[int], weights: ExpertWeights) -> Tensor:
        assert isinstance(weights, PackedExperts) and rows_RD.dtype == weights.dtype
        num_rows, hidden_size = rows_RD.shape
        assert hidden_size == weights.hidden_size and len(num_rows_E) == weights.num_experts
        assert sum(num_rows_E) == num_rows
        rows_RD, step = rows_of(rows_RD)
        out_RD = torch.empty((num_rows, hidden_size), dtype=weights.dtype)
        counts = weights.counts(*num_rows_E)
        status = self._experts(weights.address, rows_RD.data_ptr(), step, num_rows, ctypes.addressof(counts),
                               out_RD.data_ptr(), self._threads.now)
        check(status)
        return out_RD

    def combine(self, rows_RD: Tensor, row_of_TK: Tensor, weights_TK: Tensor) -> Tensor:
        assert row_of_TK.dtype is torch.int64 and weights_TK.dtype is torch.float32
        assert row_of_TK.shape == weights_TK.shape
        rows_RD, step = rows_of(rows_RD)
        row_of_TK, weights_TK = row_of_TK.contiguous(), weights_TK.contiguous()
        num_tokens, num_choices = row_of_TK.shape
        out_TD = torch.empty((num_tokens, rows_RD.shape[1]), dtype=rows_RD.dtype)
        self._combine(rows_RD.data_ptr(), step, row_of_TK.data_ptr(), weights_TK.data_ptr(), num_tokens, num_choices,
                      rows_RD.shape[1], out_TD.data_ptr(), DTYPE_CODES[rows_RD.dtype], self._threads.now)
        return out_TD

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return self._norm(x_TD, weight_D, eps, None, 0)

    def add_rms_norm(self, x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        dtype, (num_rows, size) = x_TD.dtype, x_TD.shape
        assert x_TD.is_contiguous() and delta_TD.is_contiguous() and delta_TD.dtype is dtype
        assert delta_TD.shape == x_TD.shape and weight_D.is_contiguous() and weight_D.shape[0] == size
        assert weight_D.dtype in (dtype, torch.float32)
        normed_TD = torch.empty((num_rows, size), dtype=dtype)
        self._add_rms_norm(x_TD.data_ptr(), delta_TD.data_ptr(), num_rows, size, weight_D.data_ptr(),
                           DTYPE_CODES[weight_D.dtype], eps, normed_TD.data_ptr(), DTYPE_CODES[dtype],
                           self._threads.now)
        return x_TD, normed_TD

    def gated_rms_norm(self, x_THd: Tensor, gate_THd: Tensor, weight_d: Tensor, eps: float) -> Tensor:
        assert gate_THd.shape == x_THd.shape and gate_THd.dtype is x_THd.dtype
        gate_THd, gate_step = rows_of(gate_THd)
        return self._norm(x_THd, weight_d, eps, gate_THd, gate_step)

    def _norm(self, x_TD: Tensor, weight_D: Tensor, eps: float, gate: Tensor | None,
              gate_step: int) -> Tensor:
        dtype, shape = x_TD.dtype, x_TD.shape
        assert weight_D.dtype in (dtype, torch.float32) and weight_D.is_contiguous() and weight_D.numel() == shape[-1]
        x_TD, step = rows_of(x_TD)
        out_TD = torch.empty(shape, dtype=dtype)
        self._rms_norm(x_TD.data_ptr(), step, shape[0], shape[1] if len(shape) == 3 else 1, shape[-1],
                       weight_D.data_ptr(), DTYPE_CODES[weight_D.dtype], None if gate is None else gate.data_ptr(),
                       gate_step, eps, out_TD.data_ptr(), DTYPE_CODES[dtype], self._threads.now)
        return out_TD

    def times_sigmoid(self, x_TN: Tensor, gate_TN: Tensor) -> Tensor:
        assert gate_TN.dtype is x_TN.dtype and gate_TN.shape[1] in (1, x_TN.shape[1])
        (x_TN, step), (gate_TN, gate_step) = rows_of(x_TN), rows_of(gate_TN)
        out_TN = torch.empty(x_TN.shape, dtype=x_TN.dtype)
        self._times_sigmoid(x_TN.data_ptr(), step, x_TN.shape[0], x_TN.shape[1], gate_TN.data_ptr(), gate_step,
                            gate_TN.shape[1], out_TN.data_ptr(), DTYPE_CODES[x_TN.dtype], self._threads.now)
        return out_TN

    def new_delta_net_states(self, num_layers: int, num_slots: int, num_value_heads: int, key_head_dim: int,
                             value_head_dim: int, conv_kernel_size: int, conv_width: int,
                             dtype: torch.dtype) -> list[DeltaNetState]:
        return new_delta_net_states(num_layers, num_slots, (num_value_heads, key_head_dim, value_head_dim),
                                    (conv_kernel_size, conv_width), dtype)

    def causal_conv(self, x_TC: Tensor, weight_KC: Tensor, state: DeltaNetState, batch: AttentionBatch) -> Tensor:
        return self._delta_net.causal_conv(x_TC, weight_KC, state, batch)

    def gated_delta_rule(self, qkv_TC: Tensor, ba_TJ: Tensor, gates: DeltaNetGates, state: DeltaNetState,
                         batch: AttentionBatch) -> Tensor:
        return self._delta_net.gated_delta_rule(qkv_TC, ba_TJ, gates, state, batch)

    def new_attention_block(self, weights: AttentionWeights) -> PackedAttention:
        return PackedAttention(weights, self._attention_steps, self.library, self._threads)

    def new_delta_net_block(self, weights: DeltaNetWeights) -> PackedDeltaNetBlock:
        return PackedDeltaNetBlock(weights, self._delta_net, self.library, self._threads)

    def rope(self, x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        assert cos_Td.dtype is torch.float32 and sin_Td.dtype is torch.float32
        x_THd, step = rows_of(x_THd)
        cos_Td, sin_Td = cos_Td.contiguous(), sin_Td.contiguous()
        num_tokens, num_heads, head_dim = x_THd.shape
        rotary_dim = cos_Td.shape[1]
        assert rotary_dim % 2 == 0 and rotary_dim <= head_dim and cos_Td.shape == sin_Td.shape
        assert cos_Td.shape[0] == num_tokens
        out_THd = torch.empty((num_tokens, num_heads, head_dim), dtype=x_THd.dtype)
        self._rope(x_THd.data_ptr(), step, num_tokens, num_heads, head_dim, rotary_dim, cos_Td.data_ptr(),
                   sin_Td.data_ptr(), out_THd.data_ptr(), DTYPE_CODES[x_THd.dtype], self._threads.now)
        return out_THd

    def new_kv_cache(self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int,
                     dtype: torch.dtype) -> Tensor:
        """Return [layers, blocks, key or value, G, B, d] in shape; keys lie in memory as [d, B]."""
        assert fits_block(block_size), f"block size: {BLOCK_SIZES}"
        assert head_dim <= MAX_HEAD_DIM
        return torch.zeros(num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim, dtype=dtype)

    def write_kv(self, cache: Tensor, k_TGd: Tensor, v_TGd: Tensor, batch: AttentionBatch) -> None:
        assert cache.is_contiguous() and k_TGd.dtype == v_TGd.dtype == cache.dtype
        (k_TGd, k_step), (v_TGd, v_step) = rows_of(k_TGd), rows_of(v_TGd)
        _, _, num_kv_heads, block_size, head_dim = cache.shape
        assert k_TGd.shape == v_TGd.shape and k_TGd.shape[1:] == (num_kv_heads, head_dim)
        assert batch.slots_T.dtype is torch.int64 and batch.slots_T.shape[0] == k_TGd.shape[0]
        self._write_kv(cache.data_ptr(), k_TGd.data_ptr(), k_step, v_TGd.data_ptr(), v_step,
                       batch.slots_T.contiguous().data_ptr(), k_TGd.shape[0], num_kv_heads, head_dim, block_size,
                       DTYPE_SIZES[cache.dtype])

    def attention(self, q_THd: Tensor, cache: Tensor, batch: AttentionBatch, scale: float,
                  sliding_window: int | None) -> Tensor:
        assert cache.is_contiguous() and q_THd.dtype == cache.dtype
        q_THd, step = rows_of(q_THd)
        num_tokens, num_heads, head_dim = q_THd.shape
        _, _, num_kv_heads, block_size, cache_head_dim = cache.shape
        assert head_dim == cache_head_dim and num_heads % num_kv_heads == 0
        tables_SM, lens_S, starts_S1 = batch.block_tables_SM, batch.context_lens_S, batch.query_starts_S1
        assert tables_SM.dtype is torch.int32 and lens_S.dtype is torch.int32 and starts_S1.dtype is torch.int32
        assert tables_SM.is_contiguous() and lens_S.is_contiguous() and starts_S1.is_contiguous()
        out_THd = torch.empty((num_tokens, num_heads, head_dim), dtype=q_THd.dtype)
        call = self.library.new_struct(
            "Attention", q=q_THd.data_ptr(), cache=cache.data_ptr(), out=out_THd.data_ptr(),
            query_starts=starts_S1.data_ptr(), context_lens=lens_S.data_ptr(), block_tables=tables_SM.data_ptr(),
            q_step=step, num_seqs=lens_S.shape[0], table_width=tables_SM.shape[1], num_heads=num_heads,
            num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=DTYPE_CODES[q_THd.dtype],
            sliding_window=_NO_WINDOW if sliding_window is None else sliding_window, scale=scale)
        check(self._attention(ctypes.addressof(call), self._threads.now))
        return out_THd
