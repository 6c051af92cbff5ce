"""Holds weights in the layout of the packed kernels.

Letters as in model/kernels/protocol.py
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.kernels.packed_cpu_library import KernelLibrary
from model.kernels.packed_rows import DTYPE_CODES
from model.kernels.protocol import ExpertWeights


class PackedLinear:
    """Holds panels of 16 outputs, k ascending. Rows that were never loaded are zero."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, library: KernelLibrary,
                 num_threads: int) -> None:
        """`num_threads`: that pack it."""
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = dtype
        self._library, self._num_threads = library, num_threads
        num_bytes = library.short.packed_weight_bytes(DTYPE_CODES[dtype], out_features, in_features)
        self.panels = torch.zeros(num_bytes, dtype=torch.uint8)
        self.nbytes = self.panels.nbytes
        self._struct = library.new_struct("Linear", panels=self.panels.data_ptr(), n=out_features, k=in_features,
                                          dtype=DTYPE_CODES[dtype])
        self.address = ctypes.addressof(self._struct)

    def load_rows(self, first_row: int, weight_nK: Tensor) -> None:
        assert weight_nK.shape[1] == self.in_features and first_row + weight_nK.shape[0] <= self.out_features
        weight_nK = weight_nK.to(self.dtype).contiguous()
        self._library.long.packed_pack(self.panels.data_ptr(), weight_nK.data_ptr(), first_row, weight_nK.shape[0],
                                       self.in_features, DTYPE_CODES[self.dtype], 1, 0, self._num_threads)


class PackedExperts:
    """Holds for each expert panels of gate and up alternating, then those of down."""

    def __init__(self, num_experts: int, intermediate_size: int, hidden_size: int, dtype: torch.dtype,
                 library: KernelLibrary, num_threads: int) -> None:
        """`num_threads`: that pack them."""
        self.num_experts = num_experts
        self.intermediate_size = intermediate_size
        self.hidden_size = hidden_size
        self.dtype = dtype
        self._library, self._num_threads = library, num_threads
        up_bytes, down_bytes = (library.short.packed_weight_bytes(DTYPE_CODES[dtype], n, k) for n, k in (
            (intermediate_size, hidden_size), (hidden_size, intermediate_size)))
        self.gate_up = torch.zeros(num_experts, 2 * up_bytes, dtype=torch.uint8)
        self.down = torch.zeros(num_experts, down_bytes, dtype=torch.uint8)
        self.nbytes = self.gate_up.nbytes + self.down.nbytes
        self._struct = library.new_struct(
            "Experts", gate_up=self.gate_up.data_ptr(), down=self.down.data_ptr(), num_experts=num_experts,
            intermediate=intermediate_size, hidden=hidden_size, dtype=DTYPE_CODES[dtype])
        self.address = ctypes.addressof(self._struct)
        self.counts = ctypes.c_long * num_experts

    def load_gate(self, slot: int, weight_ID: Tensor) -> None:
        assert weight_ID.shape == (self.intermediate_size, self.hidden_size)
        self._pack(self.gate_up[slot], weight_ID, 2, 0)

    def load_up(self, slot: int, weight_ID: Tensor) -> None:
        assert weight_ID.shape == (self.intermediate_size, self.hidden_size)
        self._pack(self.gate_up[slot], weight_ID, 2, 1)

    def load_down(self, slot: int, weight_DI: Tensor) -> None:
        assert weight_DI.shape == (self.hidden_size, self.intermediate_size)
        self._pack(self.down[slot], weight_DI, 1, 0)

    def copy_slot(self, slot: int, source: ExpertWeights, source_slot: int) -> None:
        assert isinstance(source, PackedExperts) and source.dtype is self.dtype
        self.gate_up[slot].copy_(source.gate_up[source_slot])
        self.down[slot].copy_(source.down[source_slot])

    def _pack(self, panels: Tensor, weight_NK: Tensor, panel_stride: int, panel_first: int) -> None:
        weight_NK = weight_NK.to(self.dtype).contiguous()
        self._library.long.packed_pack(panels.data_ptr(), weight_NK.data_ptr(), 0, weight_NK.shape[0],
                                       weight_NK.shape[1], DTYPE_CODES[self.dtype], panel_stride, panel_first,
                                       self._num_threads)
