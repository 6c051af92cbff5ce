"""Makes numbers of weights that are stored in blocks of fp8.

N, K rows and columns of a weight; n, k of its blocks
"""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(stored_NK: Tensor, factors_nk: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Return each value times the factor of its block, fp32 [N, K]. Blocks at the edges may be smaller."""
    weight_NK = stored_NK.to(torch.float32)
    rows, columns = block_size
    for index, factors_k in enumerate(factors_nk.to(torch.float32)):
        weight_NK[index * rows:(index + 1) * rows] *= factors_k.repeat_interleave(columns)[:weight_NK.shape[1]]
    return weight_NK
