"""Counts the bytes that a checkpoint's weights take in its files. Pure: for the planner, before anything is fetched.

Of a checkpoint in fp8 that is what publishers do: all linear layers are in fp8 but the gates, b and a of gated
DeltaNet, and the output layer. Each tensor's own dtype is known only from its file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from model.args import ModelArgs
from model.families import FAMILIES
from model.memory import weights_bytes
from model.quantization_args import scale_shape

_FACTOR_BYTES = 4       # of a block
_Shape = tuple[int, int]


def stored_bytes(args: ModelArgs, num_experts_of_layer: Sequence[int]) -> int:
    """Return the bytes in files of the shared weights and of so many experts of each MoE layer."""
    dtype_bytes = 4 if args.dtype == "float32" else 2
    num_bytes = weights_bytes(args, dtype_bytes, num_experts_of_layer)
    if args.zero_centered_norms:        # these are held in fp32
        norm_elements = (2 * args.num_layers + 1) * args.hidden_size
        norm_elements += 2 * args.head_dim * args.qk_norm * len(args.attention_layers)
        num_bytes -= norm_elements * (4 - dtype_bytes)
    if args.linear is not None:         # and so are the decays
        num_bytes -= len(args.linear_layers) * 2 * args.linear.num_value_heads * (4 - dtype_bytes)
    if args.tie_word_embeddings:
        num_bytes -= args.vocab_size * args.hidden_size * dtype_bytes
    linears = [*_shared_linears(args), *_expert_linears(args, args.moe_intermediate_size, sum(num_experts_of_layer))]
    return num_bytes - sum(count * _saved_bytes(args, shape, dtype_bytes) for shape, count in linears)


def stored_expert_bytes(args: ModelArgs) -> int:
    """Return the bytes in files of one expert of one layer."""
    dtype_bytes = 4 if args.dtype == "float32" else 2
    return sum(count * (dtype_bytes * math.prod(shape) - _saved_bytes(args, shape, dtype_bytes))
               for shape, count in _expert_linears(args, args.moe_intermediate_size, 1))


def _saved_bytes(args: ModelArgs, shape: _Shape, dtype_bytes: int) -> int:
    if args.weight_block_size is None:
        return 0
    factor_bytes = _FACTOR_BYTES * math.prod(scale_shape(shape, args.weight_block_size))
    return (dtype_bytes - 1) * math.prod(shape) - factor_bytes


def _shared_linears(args: ModelArgs) -> Iterator[tuple[_Shape, int]]:
    """Yield the shapes of linear layers, and how many there are."""
    num_attention, num_linear, num_moe = len(args.attention_layers), len(args.linear_layers), args.num_moe_layers
    q_width, kv_width = args.num_heads * args.head_dim, args.num_kv_heads * args.head_dim
    yield (q_width * (2 if args.gated_attention else 1), args.hidden_size), num_attention
    yield (kv_width, args.hidden_size), 2 * num_attention
    yield (args.hidden_size, q_width), num_attention
    if args.linear is not None:
        conv, value = args.linear.conv_width, args.linear.value_width
        parts = (conv, value) if FAMILIES[args.family].splits_linear_projections else (conv + value,)
        yield from (((part, args.hidden_size), num_linear) for part in parts)
        yield (args.hidden_size, value), num_linear
    yield from _expert_linears(args, args.shared_expert_size, num_moe if args.shared_expert_size else 0)
    yield from _expert_linears(args, args.intermediate_size, args.num_layers - num_moe)


def _expert_linears(args: ModelArgs, width: int, count: int) -> Iterator[tuple[_Shape, int]]:
    yield (width, args.hidden_size), 2 * count
    yield (args.hidden_size, width), count
