"""Computes functions of elements, and products of rows, so that a result does not depend on its place in its tensor
nor on what is computed beside it, on the CPU.

T rows, K input features, N output features
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_PIECE = 16384      # below torch's grain of 32,768 elements, so that one thread computes it
_MULTIPLE = 64      # of every vector width and unrolling
# Rows of each product. In 8, MKL still takes a kernel that sums up odd rows in another order where N is 2; more than
# this is wasted on one row.
_ROWS_PER_TILE = 16
# With fewer outputs, and 17 to 22 inputs, MKL for CPUs without AVX-512 sums up some of the 16 rows in another order.
_LEAST_OUTPUTS = 16


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `function` to fp32 x in pieces that torch neither splits over threads nor ends with scalar code.

    torch's vector and scalar code for exp, silu and the like differ in the last bit.
    """
    flat = x.reshape(-1)
    num_elements = flat.numel()
    extra = -num_elements % _MULTIPLE
    if extra:
        flat = functional.pad(flat, (0, extra))
    if flat.numel() <= _PIECE:
        return function(flat)[:num_elements].view(x.shape)
    return torch.cat([function(piece) for piece in torch.split(flat, _PIECE)])[:num_elements].view(x.shape)


def linear_in_tiles(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return x @ weight.T (+ bias), [T, N], by products that all have the same number of rows.

    By the number of rows, MKL and oneDNN choose kernels, and places to cut K, that add up in another order. Which
    numbers of rows they tell apart depends on the CPU, K and N, so only one number of rows is alike on all of them.
    """
    num_rows, num_outputs = x_TK.shape[0], weight_NK.shape[0]
    if num_outputs < _LEAST_OUTPUTS:
        weight_NK = functional.pad(weight_NK, (0, 0, 0, _LEAST_OUTPUTS - num_outputs))
        bias_N = None if bias_N is None else functional.pad(bias_N, (0, _LEAST_OUTPUTS - num_outputs))
    padded = functional.pad(x_TK.contiguous(), (0, 0, 0, -num_rows % _ROWS_PER_TILE))
    tiles = [functional.linear(tile_nK, weight_NK, bias_N) for tile_nK in torch.split(padded, _ROWS_PER_TILE)]
    return torch.cat(tiles)[:num_rows, :num_outputs].contiguous()
