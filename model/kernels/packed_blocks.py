"""Runs what a layer does in one call in C (packed_blocks.h): choosing experts, experts that are all here, attention.

Letters as in model/kernels/protocol.py
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.kernels.call_threads import CallThreads
from model.kernels.packed_cpu_library import KernelLibrary
from model.kernels.packed_rows import DTYPE_CODES, check, rows_of
from model.kernels.packed_weights import PackedExperts, PackedLinear
from model.kernels.protocol import AttentionBatch, AttentionWeights, ExpertWeights, LinearWeight

_NO_WINDOW = 1 << 40


class PackedMoe:
    """Is the part of PackedCpuKernels that chooses experts, and computes those that are all here."""

    def __init__(self, library: KernelLibrary, threads: CallThreads) -> None:
        self._threads = threads
        long = library.long
        self._choose_experts, self._local_experts = long.packed_choose_experts, long.packed_local_experts
        self._add_shared_expert = long.packed_add_shared_expert

    def choose_experts(self, x_TD: Tensor, weight: LinearWeight, num_choices: int, normalizes: bool,
                       rounds: bool) -> tuple[Tensor, Tensor]:
        assert isinstance(weight, PackedLinear) and x_TD.dtype is weight.dtype
        num_rows, in_features = x_TD.shape
        assert in_features == weight.in_features and 0 < num_choices <= weight.out_features
        x_TD, step = rows_of(x_TD)
        weights_TK = torch.empty((num_rows, num_choices), dtype=torch.float32)
        ids_TK = torch.empty((num_rows, num_choices), dtype=torch.int64)
        status = self._choose_experts(weight.address, x_TD.data_ptr(), step, num_rows, num_choices, normalizes, rounds,
                                      weights_TK.data_ptr(), ids_TK.data_ptr(), self._threads.now)
        if status:
            check(status)
        return weights_TK, ids_TK

    def local_experts(self, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor,
                      experts: ExpertWeights) -> tuple[Tensor, list[int]]:
        assert isinstance(experts, PackedExperts) and x_TD.dtype is experts.dtype
        assert expert_ids_TK.dtype is torch.int64 and weights_TK.dtype is torch.float32
        num_rows, hidden_size = x_TD.shape
        num_choices = expert_ids_TK.shape[1]
        assert hidden_size == experts.hidden_size and weights_TK.shape == expert_ids_TK.shape
        x_TD, step = rows_of(x_TD)
        weights_TK, expert_ids_TK = weights_TK.contiguous(), expert_ids_TK.contiguous()
        out_TD = torch.empty((num_rows, hidden_size), dtype=x_TD.dtype)
        counts_E = experts.counts()
        status = self._local_experts(experts.address, x_TD.data_ptr(), step, num_rows, num_choices,
                                     weights_TK.data_ptr(), expert_ids_TK.data_ptr(), out_TD.data_ptr(),
                                     ctypes.addressof(counts_E), self._threads.now)
        if status:
            check(status)
        return out_TD, counts_E[:]

    def add_shared_expert(self, sum_TD: Tensor, x_TD: Tensor, expert: ExpertWeights, gate: LinearWeight) -> Tensor:
        assert isinstance(expert, PackedExperts) and isinstance(gate, PackedLinear) and expert.num_experts == 1
        assert x_TD.dtype is sum_TD.dtype is expert.dtype is gate.dtype and sum_TD.is_contiguous()
        num_rows, hidden_size = x_TD.shape
        assert sum_TD.shape == x_TD.shape and hidden_size == expert.hidden_size == gate.in_features
        assert gate.out_features == 1
        x_TD, step = rows_of(x_TD)
        status = self._add_shared_expert(expert.address, gate.address, x_TD.data_ptr(), step, num_rows,
                                         sum_TD.data_ptr(), self._threads.now)
        if status:
            check(status)
        return sum_TD


class PackedAttention:
    """See AttentionBlock. Gives the bits of ComposedAttention on the same kernels."""

    def __init__(self, weights: AttentionWeights, steps: AttentionSteps, library: KernelLibrary,
                 threads: CallThreads) -> None:
        qkv, out = weights.qkv, weights.out
        assert isinstance(qkv, PackedLinear) and isinstance(out, PackedLinear) and qkv.dtype is out.dtype
        self._weights = weights         # the struct points into them
        self._in_features, self._out_features, self._dtype = qkv.in_features, out.out_features, qkv.dtype
        self._cache_shape = (2, weights.num_kv_heads, weights.head_dim)
        norms_d = [weight_d for weight_d in (weights.q_norm_d, weights.k_norm_d) if weight_d is not None]
        biases = [bias for bias in (weights.qkv_bias_J, weights.out_bias_D) if bias is not None]
        assert len({norm_d.dtype for norm_d in norms_d}) <= 1 and all(bias.dtype is qkv.dtype for bias in biases)
        assert all(weight.is_contiguous() for weight in (*norms_d, *biases))
        addresses = {name: None if weight is None else weight.data_ptr() for name, weight in (
            ("qkv_bias", weights.qkv_bias_J), ("out_bias", weights.out_bias_D), ("q_norm", weights.q_norm_d),
            ("k_norm", weights.k_norm_d))}
        self._struct = library.new_struct(
            "AttentionBlock", qkv=qkv.address, out=out.address, **addresses,
            norm_dtype=DTYPE_CODES[norms_d[0].dtype if norms_d else qkv.dtype], num_heads=weights.num_heads,
            num_kv_heads=weights.num_kv_heads, head_dim=weights.head_dim, is_gated=int(weights.is_gated),
            sliding_window=_NO_WINDOW if weights.sliding_window is None else weights.sliding_window,
            scale=weights.scale, eps=weights.eps)
        self._address = ctypes.addressof(self._struct)
        self._steps, self._threads = steps, threads
        self._attention_block = library.long.packed_attention_block

    def __call__(self, x_TD: Tensor, cos_sin: tuple[Tensor, Tensor], batch: AttentionBatch, cache: Tensor) -> Tensor:
        num_rows, in_features = x_TD.shape
        assert in_features == self._in_features and x_TD.dtype is self._dtype and cache.dtype is self._dtype
        _, two, num_kv_heads, block_size, head_dim = cache.shape
        assert (two, num_kv_heads, head_dim) == self._cache_shape and cache.is_contiguous()
        x_TD, step = rows_of(x_TD)
        out_TD = torch.empty((num_rows, self._out_features), dtype=self._dtype)
        status = self._attention_block(self._address, self._steps.address(cos_sin, batch, num_rows, block_size),
                                       x_TD.data_ptr(), step, cache.data_ptr(), out_TD.data_ptr(), self._threads.now)
        if status:
            check(status)
        return out_TD


class AttentionSteps:
    """Describes a step to C, once for all of its layers."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._known: tuple[AttentionBatch, tuple[Tensor, Tensor], int, ctypes.Structure, int] | None = None

    def address(self, cos_sin: tuple[Tensor, Tensor], batch: AttentionBatch, num_rows: int, block_size: int) -> int:
        known = self._known
        if known is None or known[0] is not batch or known[1] is not cos_sin or known[2] != block_size:
            struct = self._struct(cos_sin, batch, block_size)
            known = self._known = (batch, cos_sin, block_size, struct, ctypes.addressof(struct))
        assert batch.slots_T.shape[0] == num_rows
        return known[4]

    def _struct(self, cos_sin: tuple[Tensor, Tensor], batch: AttentionBatch, block_size: int) -> ctypes.Structure:
        cos_Td, sin_Td = cos_sin
        tables_SM, lens_S, starts_S1 = batch.block_tables_SM, batch.context_lens_S, batch.query_starts_S1
        assert all(some.dtype is torch.int32 and some.is_contiguous() for some in (tables_SM, lens_S, starts_S1))
        assert batch.slots_T.dtype is torch.int64 and batch.slots_T.is_contiguous()
        num_rows, rotary_dim = cos_Td.shape
        assert cos_Td.dtype is sin_Td.dtype is torch.float32 and rotary_dim % 2 == 0
        assert cos_Td.shape == sin_Td.shape and cos_Td.stride() == sin_Td.stride() and cos_Td.stride(1) == 1
        assert num_rows == batch.slots_T.shape[0]
        return self._library.new_struct(
            "AttentionStep", query_starts=starts_S1.data_ptr(), context_lens=lens_S.data_ptr(),
            block_tables=tables_SM.data_ptr(), slots=batch.slots_T.data_ptr(), cos=cos_Td.data_ptr(),
            sin=sin_Td.data_ptr(), rope_step=cos_Td.stride(0) * 4, rotary_size=rotary_dim, num_tokens=num_rows,
            num_seqs=lens_S.shape[0], table_width=tables_SM.shape[1], block_size=block_size)
