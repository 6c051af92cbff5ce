"""The planner's bytes are those of the tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.args import ModelArgs, parse_model_args, read_model_args
from model.decoder import Decoder
from model.kernels.protocol import Kernels
from model.kernels.select import select_kernels
from model.kernels.torch_kernels import TorchKernels
from model.memory import expert_bytes, kv_block_bytes, shared_bytes, weights_bytes


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True}, {"mlp_only_layers": []},
                                    {"tie_word_embeddings": True}, {"mlp_only_layers": [0, 1]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_held(write_tiny: Callable[..., Path], fields: dict[str, object], dtype: torch.dtype) -> None:
    args: ModelArgs = read_model_args(write_tiny(**fields))
    num_experts = [3, 0][:args.num_moe_layers]
    decoder = Decoder(args, TorchKernels(), dtype, tuple(num_experts))
    size = dtype.itemsize
    assert weights_bytes(args, size, num_experts) == decoder.weights_bytes
    assert decoder.weights_bytes == shared_bytes(args, size) + sum(num_experts) * expert_bytes(args, size)


HYBRID: dict[str, object] = {
    "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "intermediate_size": 80,
    "num_experts": 4, "num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 32}


@pytest.mark.parametrize("kernels", [TorchKernels(), select_kernels("cpu", 1)], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize(("family", "fields"), [
    ("qwen2_moe", {}), ("qwen2_moe", {"qkv_bias": False, "mlp_only_layers": [1]}), ("qwen3_next", {}),
    ("qwen3_next", {"mlp_only_layers": [0, 3], "attention_bias": True}), ("qwen3_5_moe_text", {}),
    ("qwen3_5_moe_text", {"full_attention_interval": 2, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 3}),
    ("qwen3_5_moe_text", {"layer_types": ["full_attention"] * 4})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_shared_experts_and_linear_layers(kernels: Kernels, family: str, fields: dict[str, object],
                                                   dtype: torch.dtype) -> None:
    args = parse_model_args({"model_type": family} | HYBRID | fields)
    num_experts = [2] * args.num_moe_layers
    decoder = Decoder(args, kernels, dtype, tuple(num_experts))
    padding = 0 if kernels.name.startswith("torch") else _panel_padding(args, dtype)
    assert decoder.weights_bytes - padding == weights_bytes(args, dtype.itemsize, num_experts)


def _panel_padding(args: ModelArgs, dtype: torch.dtype) -> int:
    """Return the bytes of rows that fill up the last panel of 16: of gates, and of b and a beside the projections."""
    missing = args.num_moe_layers * (-args.num_experts % 16 + 15)
    if args.linear is not None:
        widths = args.linear.conv_width + args.linear.value_width + 2 * args.linear.num_value_heads
        missing += len(args.linear_layers) * (-widths % 16)
    return missing * args.hidden_size * dtype.itemsize


def test_kv_block(write_tiny: Callable[..., Path]) -> None:
    args = read_model_args(write_tiny())
    cache = TorchKernels().new_kv_cache(args.num_layers, 10, 4, args.num_kv_heads, args.head_dim, torch.bfloat16)
    assert kv_block_bytes(args, 4, 2) * 10 == cache.nbytes
