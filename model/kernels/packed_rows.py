"""Tells the packed kernels of a tensor's rows: its dtype by number, and the bytes from one row to the next; and what
a kernel answers."""

from __future__ import annotations

import torch
from torch import Tensor

from model.errors import OutOfMemoryError

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}     # `Dtype` of packed_simd.h
DTYPE_SIZES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
BAD_ID, EXCHANGE_FAILED = 2, 3                                             # answers, as in packed_cpu.c


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """Return x with contiguous rows (copied if they are not), and the bytes from one row to the next."""
    strides = x.stride()
    if strides[-1] != 1 or (len(strides) == 3 and strides[1] != x.shape[2]):
        x = x.contiguous()
        strides = x.stride()
    return x, strides[0] * DTYPE_SIZES[x.dtype]


def check(status: int) -> None:
    """Raise what a kernel's answer says."""
    if status == BAD_ID:
        raise ValueError("an expert id that none of the experts here has: the rows of this layer do not stay")
    if status:
        raise OutOfMemoryError("no memory for the intermediate rows of a kernel", fix="lower max_batch_tokens")
