"""The planner's bytes are those of the tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.args import ModelArgs, read_model_args
from model.decoder import Decoder
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


def test_kv_block(write_tiny: Callable[..., Path]) -> None:
    args = read_model_args(write_tiny())
    cache = TorchKernels().new_kv_cache(args.num_layers, 10, 4, args.num_kv_heads, args.head_dim, torch.bfloat16)
    assert kv_block_bytes(args, 4, 2) * 10 == cache.nbytes
