"""Counts the bytes that a checkpoint takes in memory. Pure: for the planner, before anything is loaded.

Counts elements in the dtype that the model runs in. Kernels may pad their layouts; LoadReport.weights_bytes says what
is held.
"""

from __future__ import annotations

from collections.abc import Sequence

from model.args import ModelArgs

PAIR_BYTES = 2 * ((1 << 20) + 128)      # that two members of a machine share: transport_segment_bytes of transport.c


def expert_bytes(args: ModelArgs, dtype_bytes: int) -> int:
    """Return the bytes of one expert of one layer: gate, up and down."""
    return 3 * args.hidden_size * args.moe_intermediate_size * dtype_bytes


def shared_bytes(args: ModelArgs, dtype_bytes: int) -> int:
    """Return the bytes that every member with requests holds: embedding, output layer (a copy of its own when tied),
    attention, gated DeltaNet, norms, gates, shared experts, dense layers."""
    hidden = args.hidden_size
    num_dense = args.num_layers - args.num_moe_layers
    elements = 2 * args.vocab_size * hidden
    elements += len(args.attention_layers) * _attention_elements(args)
    elements += args.num_moe_layers * args.num_experts * hidden
    elements += num_dense * 3 * hidden * args.intermediate_size
    if args.shared_expert_size:
        elements += args.num_moe_layers * (3 * args.shared_expert_size + 1) * hidden
    norm_elements = (2 * args.num_layers + 1) * hidden + 2 * args.head_dim * args.qk_norm * len(args.attention_layers)
    return (elements * dtype_bytes + norm_elements * (4 if args.zero_centered_norms else dtype_bytes)
            + len(args.linear_layers) * _delta_net_bytes(args, dtype_bytes))


def _attention_elements(args: ModelArgs) -> int:
    """Return the weights of one layer, but for the norms."""
    hidden, q_width = args.hidden_size, args.num_heads * args.head_dim
    qkv_width = q_width * (2 if args.gated_attention else 1) + 2 * args.num_kv_heads * args.head_dim
    return qkv_width * (hidden + args.qkv_bias) + hidden * (q_width + args.out_bias)


def _delta_net_bytes(args: ModelArgs, dtype_bytes: int) -> int:
    """Return the bytes of one layer, but for the norm before it."""
    if args.linear is None:
        return 0
    sizes, heads = args.linear, args.linear.num_value_heads
    projections = (sizes.conv_width + sizes.value_width + 2 * heads) * args.hidden_size
    elements = projections + sizes.conv_kernel_size * sizes.conv_width + sizes.value_head_dim
    return (elements + args.hidden_size * sizes.value_width) * dtype_bytes + 2 * heads * 4


def weights_bytes(args: ModelArgs, dtype_bytes: int, num_experts_of_layer: Sequence[int]) -> int:
    """Return the bytes of one member's weights, with so many expert copies in each MoE layer."""
    return shared_bytes(args, dtype_bytes) + sum(num_experts_of_layer) * expert_bytes(args, dtype_bytes)


def kv_block_bytes(args: ModelArgs, block_size: int, dtype_bytes: int) -> int:
    """Return the bytes of a KV block: keys and values of `block_size` positions, all layers that attend."""
    return len(args.attention_layers) * 2 * args.num_kv_heads * args.head_dim * block_size * dtype_bytes


def state_slot_bytes(args: ModelArgs, dtype_bytes: int) -> int:
    """Return the bytes of one state slot: recurrent states in fp32 and the convolutions' rows, all such layers."""
    if args.linear is None:
        return 0
    conv_bytes = (args.linear.conv_kernel_size - 1) * args.linear.conv_width * dtype_bytes
    return len(args.linear_layers) * (args.linear.state_size * 4 + conv_bytes)
