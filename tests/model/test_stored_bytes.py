"""The bytes of a checkpoint's files are those counted from its config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.args import parse_model_args, read_model_args
from model.checkpoint import Checkpoint
from model.memory import expert_bytes
from model.stored_bytes import stored_bytes, stored_expert_bytes
from tests.model.tiny_hybrids import save_hybrid, store_in_fp8


def bytes_of(folder: Path) -> int:
    return sum(tensor.end - tensor.start for tensor in Checkpoint(folder).tensors.values())


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}])
def test_a_checkpoint_in_its_own_dtype(write_tiny: Callable[..., Path], fields: dict[str, Any]) -> None:
    args = read_model_args(write_tiny(**fields))
    in_files = bytes_of(write_tiny()) + (2 * (64 + 32) * 4 if "attention_bias" in fields else 0)
    in_files -= 64 * 32 * 4 if "tie_word_embeddings" in fields else 0
    assert stored_bytes(args, [4]) == in_files
    assert stored_expert_bytes(args) == expert_bytes(args, 4)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
def test_a_hybrid_and_its_copy_in_fp8(family: str, tmp_path: Path) -> None:
    folder = save_hybrid(tmp_path / "whole", family)
    args = read_model_args(folder)
    num_experts = [args.num_experts] * args.num_moe_layers
    assert stored_bytes(args, num_experts) == bytes_of(folder)
    small = store_in_fp8(folder, tmp_path / "fp8", (32, 16))
    args = read_model_args(small)
    assert stored_bytes(args, num_experts) == bytes_of(small) < bytes_of(folder)
    one_less = [*num_experts[:-1], args.num_experts - 1]
    assert stored_bytes(args, num_experts) - stored_bytes(args, one_less) == stored_expert_bytes(args)


def test_a_model_of_the_published_size() -> None:
    """Qwen3.5-35B-A3B in fp8: a byte for nearly each of its 35 billion weights."""
    config = {"model_type": "qwen3_5_moe_text", "dtype": "bfloat16"}
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    whole, fp8 = (parse_model_args(json.loads(json.dumps(fields))) for fields in (
        config, config | {"quantization_config": quantization}))
    assert 65e9 < stored_bytes(whole, [256] * 40) < 72e9
    assert 34e9 < stored_bytes(fp8, [256] * 40) < 37e9
