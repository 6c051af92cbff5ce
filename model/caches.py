"""Holds what sequences own on a member: keys and values in blocks, and states of gated DeltaNet layers in slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from model.args import ModelArgs
from model.kernels.protocol import DeltaNetState, Kernels

_BLOCKS_AT_ONCE = 256       # that are copied: bounds what is held beside both caches of a layer


class SequenceCaches:
    """Blocks and slots of all layers, handed to each layer as what it is. The scheduler says who owns which.

    A step reads a sequence's state from one slot and writes it to another, so a step that failed can be run again, and
    a slot that is kept is a snapshot of the state at its position.
    """

    def __init__(self, args: ModelArgs, kernels: Kernels, dtype: torch.dtype, num_blocks: int, block_size: int,
                 num_state_slots: int) -> None:
        self._kernels = kernels
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_state_slots = num_state_slots if args.linear_layers else 0
        self._new_kv = partial(kernels.new_kv_cache, 1, block_size=block_size, num_kv_heads=args.num_kv_heads,
                               head_dim=args.head_dim, dtype=dtype)
        linear = args.linear
        self.states: list[DeltaNetState] = [] if linear is None else kernels.new_delta_net_states(
            len(args.linear_layers), num_state_slots, linear.num_value_heads, linear.key_head_dim,
            linear.value_head_dim, linear.conv_kernel_size, linear.conv_width, dtype)
        self.kv_of_layer: dict[int, Tensor] = {layer: self._new_kv(num_blocks=num_blocks)[0]
                                               for layer in args.attention_layers}
        self.state_of_layer: dict[int, DeltaNetState] = dict(zip(args.linear_layers, self.states, strict=True))

    @property
    def nbytes(self) -> int:
        return sum(kv.nbytes for kv in self.kv_of_layer.values()) + sum(
            state.recurrent_NHkv.nbytes + state.conv_NcC.nbytes for state in self.states)

    # Bytes of blocks and states, for the same places in the caches of another member. On any one thread, while nobody
    # writes what is read, and nobody uses what is written.

    @property
    def format(self) -> str:
        """Return what is equal for two caches exactly if the bytes of one mean the same in the other."""
        kv = next(iter(self.kv_of_layer.values()))
        dim = self._kernels.kv_block_dim
        block = [*kv.shape[:dim], *kv.shape[dim + 1:]]
        state = [[*part.shape[1:]] for part in self._state_parts(0)] if self.states else []
        return (f"{self._kernels.name} {kv.dtype} block_size {self.block_size} kv {len(self.kv_of_layer)} x {block} "
                f"states {len(self.states)} x {state}")

    @property
    def block_bytes(self) -> int:
        return sum(kv.nbytes for kv in self.kv_of_layer.values()) // max(1, self.num_blocks)

    @torch.inference_mode()
    def read_blocks(self, numbers: Sequence[int]) -> bytes:
        """Return the keys and values of these blocks, layer by layer."""
        dim, index = self._kernels.kv_block_dim, torch.tensor(numbers, device=self._kernels.device)
        return b"".join(_bytes_of(kv.index_select(dim, index)) for kv in self.kv_of_layer.values())

    @torch.inference_mode()
    def write_blocks(self, numbers: Sequence[int], content: bytes) -> None:
        """Put what read_blocks() has read of as many blocks into these. Raises ValueError for another length."""
        dim, index = self._kernels.kv_block_dim, torch.tensor(numbers, device=self._kernels.device)
        targets = [*self.kv_of_layer.values()]
        shapes = [torch.Size((*kv.shape[:dim], len(numbers), *kv.shape[dim + 1:])) for kv in targets]
        for kv, part in zip(targets, _parts_of(content, shapes, [kv.dtype for kv in targets]), strict=True):
            kv.index_copy_(dim, index, part.to(kv.device))

    @torch.inference_mode()
    def read_state(self, slot: int, index: int) -> bytes:
        """Return the state in a slot of the layer with that index among those that keep one."""
        return b"".join(_bytes_of(part[slot]) for part in self._state_parts(index))

    @torch.inference_mode()
    def write_state(self, slot: int, index: int, content: bytes) -> None:
        """Put what read_state() has read of the same layer into a slot. Raises ValueError for another length."""
        targets = [part[slot] for part in self._state_parts(index)]
        for target, part in zip(targets, _parts_of(content, [target.shape for target in targets],
                                                   [target.dtype for target in targets]), strict=True):
            target.copy_(part)

    def _state_parts(self, index: int) -> tuple[Tensor, Tensor]:
        return self.states[index].recurrent_NHkv, self.states[index].conv_NcC

    def resize(self, num_blocks: int, new_number_of: Mapping[int, int]) -> None:
        """Go on with another number of blocks, between two steps. What is in the blocks of `new_number_of` is kept, in
        the new ones. Layer by layer: no more than one of them is held twice."""
        numbers, dim = [*new_number_of.items()], self._kernels.kv_block_dim
        parts = [torch.tensor(numbers[first:first + _BLOCKS_AT_ONCE], device=self._kernels.device)
                 for first in range(0, len(numbers), _BLOCKS_AT_ONCE)]
        for layer in [*self.kv_of_layer]:
            before, after = self.kv_of_layer.pop(layer), self._new_kv(num_blocks=num_blocks)[0]
            for some in parts:
                after.index_copy_(dim, some[:, 1], before.index_select(dim, some[:, 0]))
            self.kv_of_layer[layer] = after
        self.num_blocks = num_blocks


def _bytes_of(part: Tensor) -> bytes:
    return part.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()


def _parts_of(content: bytes, shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Cut bytes into tensors. Raises ValueError when they are too few or too many."""
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    if sum(sizes) != len(content):
        raise ValueError(f"{len(content)} bytes for a part of the caches that has {sum(sizes)}")
    parts, at = [], 0
    for shape, dtype, size in zip(shapes, dtypes, sizes, strict=True):
        part = torch.empty(size, dtype=torch.uint8)     # aligned, which the content need not be
        part.numpy()[:] = np.frombuffer(content, np.uint8, size, at)
        parts.append(part.view(dtype).view(shape))
        at += size
    return parts
