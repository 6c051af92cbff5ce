"""Computes functions of elements so that a result does not depend on the element's place in its tensor, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_PIECE = 16384      # below torch's grain of 32,768 elements, so that one thread computes it
_MULTIPLE = 64      # of every vector width and unrolling


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
