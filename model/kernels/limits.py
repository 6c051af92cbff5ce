"""The largest shapes that kernels take, one table for all: C has buffers of these sizes, ids of experts travel in 16
bits. Pure: no torch, so that a checkpoint is refused before anything is loaded."""

from __future__ import annotations

MAX_HEAD_DIM = 256          # of attention; packed_attention.h
MAX_KEY_HEAD_DIM = 256      # of gated DeltaNet; packed_delta_net.h
MAX_CONV_KERNEL = 16        # tokens that its convolution looks at; packed_delta_net.h
MAX_EXPERTS = 32_767        # of a layer; dispatch/row_plan.py
MAX_GATHERED_ROWS = 256     # of a step whose layers are one call each; packed_scratch.h keeps memory for them
BLOCK_SIZES = "1, 2, 4, 8 or a multiple of 16"      # tokens of a KV block


def fits_block(block_size: int) -> bool:
    return block_size in (1, 2, 4, 8) or (block_size > 0 and block_size % 16 == 0)


def above_limit(head_dim: int, num_experts: int, key_head_dim: int = 0, conv_kernel_size: int = 0,
                ) -> tuple[str, int, int] | None:
    """Return the field of config.json that is too large, its value and the limit. None: kernels take the shape."""
    table = (("head_dim", head_dim, MAX_HEAD_DIM), ("num_experts", num_experts, MAX_EXPERTS),
             ("linear_key_head_dim", key_head_dim, MAX_KEY_HEAD_DIM),
             ("linear_conv_kernel_dim", conv_kernel_size, MAX_CONV_KERNEL))
    return next((row for row in table if row[1] > row[2]), None)
