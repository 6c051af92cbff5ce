"""Holds what sequences own on a member: keys and values in blocks, and states of gated DeltaNet layers in slots."""

from __future__ import annotations

import torch
from torch import Tensor

from model.args import ModelArgs
from model.kernels.protocol import DeltaNetState, Kernels


class SequenceCaches:
    """Blocks and slots of all layers, handed to each layer as what it is. The scheduler says who owns which.

    A step reads a sequence's state from one slot and writes it to another, so a step that failed can be run again, and
    a slot that is kept is a snapshot of the state at its position.
    """

    def __init__(self, args: ModelArgs, kernels: Kernels, dtype: torch.dtype, num_blocks: int, block_size: int,
                 num_state_slots: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_state_slots = num_state_slots if args.linear_layers else 0
        self.kv = kernels.new_kv_cache(len(args.attention_layers), num_blocks, block_size, args.num_kv_heads,
                                       args.head_dim, dtype)
        linear = args.linear
        self.states: list[DeltaNetState] = [] if linear is None else kernels.new_delta_net_states(
            len(args.linear_layers), num_state_slots, linear.num_value_heads, linear.key_head_dim,
            linear.value_head_dim, linear.conv_kernel_size, linear.conv_width, dtype)
        self.kv_of_layer: dict[int, Tensor] = dict(zip(args.attention_layers, self.kv.unbind(0), strict=True))
        self.state_of_layer: dict[int, DeltaNetState] = dict(zip(args.linear_layers, self.states, strict=True))

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + sum(state.recurrent_NHkv.nbytes + state.conv_NcC.nbytes for state in self.states)
