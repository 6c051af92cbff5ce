"""Counts the bytes that a checkpoint takes in memory. Pure: for the planner, before anything is loaded.

Counts elements in the dtype that the model runs in. Kernels may pad their layouts; LoadReport.weights_bytes says what
is held.
"""

from __future__ import annotations

from collections.abc import Sequence

from model.args import ModelArgs


def expert_bytes(args: ModelArgs, dtype_bytes: int) -> int:
    """Return the bytes of one expert of one layer: gate, up and down."""
    return 3 * args.hidden_size * args.moe_intermediate_size * dtype_bytes


def shared_bytes(args: ModelArgs, dtype_bytes: int) -> int:
    """Return the bytes that every member holds: embedding, output layer (a copy of its own when tied), attention,
    norms, gates, dense layers."""
    hidden, heads_width = args.hidden_size, args.num_heads * args.head_dim
    qkv_width = heads_width + 2 * args.num_kv_heads * args.head_dim
    attention = qkv_width * hidden + hidden * heads_width + 2 * hidden
    attention += 2 * args.head_dim if args.qk_norm else 0
    attention += qkv_width + hidden if args.attention_bias else 0
    num_dense = args.num_layers - args.num_moe_layers
    elements = 2 * args.vocab_size * hidden + hidden
    elements += args.num_layers * attention
    elements += args.num_moe_layers * args.num_experts * hidden
    elements += num_dense * 3 * hidden * args.intermediate_size
    return elements * dtype_bytes


def weights_bytes(args: ModelArgs, dtype_bytes: int, num_experts_of_layer: Sequence[int]) -> int:
    """Return the bytes of one member's weights, with so many expert copies in each MoE layer."""
    return shared_bytes(args, dtype_bytes) + sum(num_experts_of_layer) * expert_bytes(args, dtype_bytes)


def kv_block_bytes(args: ModelArgs, block_size: int, dtype_bytes: int) -> int:
    """Return the bytes of a KV block: keys and values of `block_size` positions, all layers."""
    return args.num_layers * 2 * args.num_kv_heads * args.head_dim * block_size * dtype_bytes
