"""Gated DeltaNet in C (packed_delta_net.h): states, causal convolution, recurrence.

Letters as in model/kernels/protocol.py
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.kernels.call_threads import CallThreads
from model.kernels.limits import MAX_CONV_KERNEL, MAX_KEY_HEAD_DIM
from model.kernels.packed_cpu_library import KernelLibrary
from model.kernels.packed_rows import DTYPE_CODES, check, rows_of
from model.kernels.packed_weights import PackedLinear
from model.kernels.protocol import AttentionBatch, DeltaNetGates, DeltaNetState, DeltaNetWeights

_PANEL_COLUMNS, _LANES = 64, 16


def new_delta_net_states(num_layers: int, num_slots: int, recurrent_Hkv: tuple[int, int, int],
                         conv_KC: tuple[int, int], dtype: torch.dtype) -> list[DeltaNetState]:
    """Return states that are zero, by layer. A recurrent state lies in panels of columns: see unpacked_state()."""
    assert recurrent_Hkv[1] <= MAX_KEY_HEAD_DIM and conv_KC[0] <= MAX_CONV_KERNEL
    return [DeltaNetState(torch.zeros(num_slots, *recurrent_Hkv),
                          torch.zeros(num_slots, conv_KC[0] - 1, conv_KC[1], dtype=dtype)) for _ in range(num_layers)]


def unpacked_state(recurrent_NHkv: Tensor) -> Tensor:
    """Return a copy of the states in the order of their shape, [N, H, k, v]."""
    num_slots, num_heads, key_dim, value_dim = recurrent_NHkv.shape
    panels = torch.split(recurrent_NHkv.reshape(num_slots, num_heads, -1),
                         [key_dim * width for width in panel_widths(value_dim)], dim=2)
    return torch.cat([panel.reshape(num_slots, num_heads, key_dim, -1) for panel in panels], dim=3)


def panel_widths(value_dim: int) -> list[int]:
    """Return the columns of each panel: 64 as long as there are 64, then 16, then the rest."""
    widths = [_PANEL_COLUMNS] * (value_dim // _PANEL_COLUMNS)
    widths += [_LANES] * (value_dim % _PANEL_COLUMNS // _LANES)
    return widths + ([value_dim % _LANES] if value_dim % _LANES else [])


class PackedDeltaNet:
    """The part of PackedCpuKernels that is gated DeltaNet's own."""

    def __init__(self, library: KernelLibrary, threads: CallThreads) -> None:
        self._library, self._threads = library, threads
        self._causal_conv = library.short.packed_causal_conv
        self._gated_delta_rule = library.long.packed_gated_delta_rule
        self._sequences_of: tuple[AttentionBatch, ctypes.Structure] | None = None

    def causal_conv(self, x_TC: Tensor, weight_KC: Tensor, state: DeltaNetState, batch: AttentionBatch) -> Tensor:
        slots, (x_TC, step) = state.conv_NcC, rows_of(x_TC)
        assert x_TC.dtype is weight_KC.dtype is slots.dtype and weight_KC.is_contiguous() and slots.is_contiguous()
        assert weight_KC.shape == (slots.shape[1] + 1, x_TC.shape[1]) and slots.shape[2] == x_TC.shape[1]
        out_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype)
        seqs = self.sequences(batch)
        call = self._library.new_struct(
            "Conv", x=x_TC.data_ptr(), weight=weight_KC.data_ptr(), slots=slots.data_ptr(), out=out_TC.data_ptr(),
            step=step, width=x_TC.shape[1], kernel=weight_KC.shape[0], dtype=DTYPE_CODES[x_TC.dtype],
            seqs=ctypes.addressof(seqs))
        self._causal_conv(ctypes.addressof(call), self._threads.now)
        return out_TC

    def gated_delta_rule(self, qkv_TC: Tensor, ba_TJ: Tensor, gates: DeltaNetGates, state: DeltaNetState,
                         batch: AttentionBatch) -> Tensor:
        slots = state.recurrent_NHkv
        _, num_heads, key_dim, value_dim = slots.shape
        (qkv_TC, qkv_step), (ba_TJ, ba_step) = rows_of(qkv_TC), rows_of(ba_TJ)
        num_key_heads = (qkv_TC.shape[1] - num_heads * value_dim) // (2 * key_dim)
        assert qkv_TC.shape[1] == 2 * num_key_heads * key_dim + num_heads * value_dim
        assert ba_TJ.shape == (qkv_TC.shape[0], 2 * num_heads) and ba_TJ.dtype is qkv_TC.dtype
        assert num_heads % num_key_heads == 0 and slots.is_contiguous() and slots.dtype is torch.float32
        out_THv = torch.empty((qkv_TC.shape[0], num_heads, value_dim), dtype=qkv_TC.dtype)
        seqs = self.sequences(batch)
        call = self._library.new_struct(
            "DeltaRule", qkv=qkv_TC.data_ptr(), ba=ba_TJ.data_ptr(), rate=gates.rate_H.data_ptr(),
            bias=gates.bias_H.data_ptr(), slots=slots.data_ptr(), out=out_THv.data_ptr(), qkv_step=qkv_step,
            ba_step=ba_step, num_key_heads=num_key_heads, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim,
            dtype=DTYPE_CODES[qkv_TC.dtype], seqs=ctypes.addressof(seqs))
        self._gated_delta_rule(ctypes.addressof(call), self._threads.now)
        return out_THv

    def sequences(self, batch: AttentionBatch) -> ctypes.Structure:
        """Return the sequences of a step, described once for all of its layers."""
        known = self._sequences_of
        if known is not None and known[0] is batch:
            return known[1]
        assert batch.state_reads_S is not None and batch.state_writes_S is not None
        numbers = {"query_starts": batch.query_starts_S1, "reads": batch.state_reads_S, "writes": batch.state_writes_S,
                   "kept_starts": batch.snapshot_starts_S1, "kept_rows": batch.snapshot_rows_W,
                   "kept_slots": batch.snapshot_slots_W}
        assert all(some is None or (some.dtype is torch.int32 and some.is_contiguous()) for some in numbers.values())
        assert batch.state_reads_S.shape == batch.state_writes_S.shape
        addresses = {name: None if some is None else some.data_ptr() for name, some in numbers.items()}
        sequences = self._library.new_struct("Sequences", **addresses, num_seqs=batch.state_reads_S.shape[0])
        self._sequences_of = (batch, sequences)
        return sequences


class PackedDeltaNetBlock:
    """See DeltaNetBlock. Gives the bits of ComposedDeltaNet on the same kernels."""

    def __init__(self, weights: DeltaNetWeights, delta_net: PackedDeltaNet, library: KernelLibrary,
                 threads: CallThreads) -> None:
        projections, out, conv_KC = weights.projections, weights.out, weights.conv_weight_KC
        assert isinstance(projections, PackedLinear) and isinstance(out, PackedLinear)
        assert projections.dtype is out.dtype is conv_KC.dtype is weights.norm_v.dtype
        gates = weights.gates
        assert all(some.is_contiguous() for some in (conv_KC, weights.norm_v, gates.rate_H, gates.bias_H))
        self._weights = weights         # the struct points into them
        self._in_features, self._out_features, self._dtype = projections.in_features, out.out_features, out.dtype
        self._recurrent_shape = (weights.num_value_heads, weights.key_head_dim, weights.value_head_dim)
        self._conv_shape = (conv_KC.shape[0] - 1, conv_KC.shape[1])
        value_width = weights.num_value_heads * weights.value_head_dim
        assert conv_KC.shape[1] == 2 * weights.num_key_heads * weights.key_head_dim + value_width
        assert projections.out_features == conv_KC.shape[1] + value_width + 2 * weights.num_value_heads
        self._struct = library.new_struct(
            "DeltaNetBlock", projections=projections.address, out=out.address, conv_weight=conv_KC.data_ptr(),
            rate=gates.rate_H.data_ptr(), bias=gates.bias_H.data_ptr(), norm=weights.norm_v.data_ptr(),
            num_key_heads=weights.num_key_heads, num_heads=weights.num_value_heads, key_dim=weights.key_head_dim,
            value_dim=weights.value_head_dim, conv_kernel=conv_KC.shape[0], eps=weights.eps)
        self._address = ctypes.addressof(self._struct)
        self._delta_net, self._threads = delta_net, threads
        self._delta_net_block = library.long.packed_delta_net_block

    def __call__(self, x_TD: Tensor, batch: AttentionBatch, state: DeltaNetState) -> Tensor:
        num_rows, in_features = x_TD.shape
        recurrent_NHkv, conv_NcC = state.recurrent_NHkv, state.conv_NcC
        assert in_features == self._in_features and x_TD.dtype is conv_NcC.dtype is self._dtype
        assert recurrent_NHkv.shape[1:] == self._recurrent_shape and conv_NcC.shape[1:] == self._conv_shape
        assert recurrent_NHkv.is_contiguous() and conv_NcC.is_contiguous()
        assert num_rows == batch.slots_T.shape[0]
        x_TD, step = rows_of(x_TD)
        out_TD = torch.empty((num_rows, self._out_features), dtype=self._dtype)
        status = self._delta_net_block(
            self._address, ctypes.addressof(self._delta_net.sequences(batch)), x_TD.data_ptr(), step,
            conv_NcC.data_ptr(), recurrent_NHkv.data_ptr(), out_TD.data_ptr(), self._threads.now)
        if status:
            check(status)
        return out_TD
