"""Computes the rotary embedding's cosines and sines (RoPE, linear and yarn scaling) as transformers 5 does.

T rows of this step, P positions in the table, d head size, j = 2 d
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from model.rope_args import RopeArgs

POSITIONS_PER_CHUNK = 1024


class RopeTable:
    """Holds cos and sin by position, fp32. It is filled in chunks of fixed size and place by one thread, because a
    vectorized cosine may differ in the last bit with an element's place in its array: so a position has one value for
    all."""

    def __init__(self, args: RopeArgs, head_dim: int, device: torch.device) -> None:
        self._inv_freq = inverse_frequencies(args, head_dim)
        self._attention_factor = args.attention_factor
        self._device = device
        self._head_dim = head_dim
        self._cos_sin_Pj = torch.empty(0, 2 * head_dim, device=device)

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [T, d], both halves alike. positions_T: int32 on the CPU, at least one."""
        max_position = int(positions_T.max())
        if max_position >= self._cos_sin_Pj.shape[0]:
            self._grow(max_position + 1)
        cos_sin_Tj = self._cos_sin_Pj.index_select(0, positions_T.to(self._device))
        return cos_sin_Tj[:, :self._head_dim], cos_sin_Tj[:, self._head_dim:]

    def _grow(self, num_positions: int) -> None:
        first, last = self._cos_sin_Pj.shape[0] // POSITIONS_PER_CHUNK, -(-num_positions // POSITIONS_PER_CHUNK)
        chunks = [self._chunk(index).to(self._device) for index in range(first, last)]
        self._cos_sin_Pj = torch.cat((self._cos_sin_Pj, *chunks))

    def _chunk(self, index: int) -> Tensor:
        positions = torch.arange(index * POSITIONS_PER_CHUNK, (index + 1) * POSITIONS_PER_CHUNK).float()
        angles = (positions[:, None] * self._inv_freq).double().numpy()
        cos, sin = np.cos(angles), np.sin(angles)
        cos_sin = np.concatenate((cos, cos, sin, sin), axis=1) * self._attention_factor
        return torch.from_numpy(cos_sin).float()


def inverse_frequencies(args: RopeArgs, head_dim: int) -> Tensor:
    """Return fp32 [d / 2], on the CPU."""
    powers = args.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if args.kind == "yarn":
        return _yarn_frequencies(args, head_dim, powers)
    return (1.0 / powers) / args.factor


def _yarn_frequencies(args: RopeArgs, head_dim: int, powers: Tensor) -> Tensor:
    """Scale by YaRN: fast dimensions keep their frequency, slow ones are divided by the factor, a ramp lies between."""
    low, high = (_dim_that_turns(rotations, args, head_dim) for rotations in (args.beta_fast, args.beta_slow))
    if args.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    return 1.0 / (args.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _dim_that_turns(num_rotations: float, args: RopeArgs, head_dim: int) -> float:
    """Return the dimension that turns `num_rotations` times within the original context."""
    turns = args.original_max_positions / (num_rotations * 2 * math.pi)
    return (head_dim * math.log(turns)) / (2 * math.log(args.theta))
