"""Tiny random checkpoints, written without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "float32", "vocab_size": 64,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 128, "norm_topk_prob": True, "mlp_only_layers": [0]}


def tiny_tensors() -> dict[str, Tensor]:
    """Return the tensors that CONFIG calls for: layer 0 is dense, layer 1 has four experts."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, 32), "lm_head.weight": (64, 32), "model.norm.weight": (32,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}input_layernorm.weight": (32,), f"{prefix}post_attention_layernorm.weight": (32,),
                   f"{prefix}self_attn.q_proj.weight": (32, 32), f"{prefix}self_attn.k_proj.weight": (16, 32),
                   f"{prefix}self_attn.v_proj.weight": (16, 32), f"{prefix}self_attn.o_proj.weight": (32, 32),
                   f"{prefix}self_attn.q_norm.weight": (8,), f"{prefix}self_attn.k_norm.weight": (8,)}
    blocks = {"model.layers.0.mlp.": 48} | {f"model.layers.1.mlp.experts.{i}.": 16 for i in range(4)}
    for block, width in blocks.items():
        shapes |= {f"{block}gate_proj.weight": (width, 32), f"{block}up_proj.weight": (width, 32),
                   f"{block}down_proj.weight": (32, width)}
    shapes["model.layers.1.mlp.gate.weight"] = (4, 32)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


@pytest.fixture
def tiny_config() -> dict[str, object]:
    return dict(CONFIG)


@pytest.fixture
def write_tiny(tmp_path: Path) -> Callable[..., Path]:
    """write_tiny(tensors changed or removed with None, **config fields changed) -> folder."""

    def write(changes: dict[str, Tensor | None] | None = None, **fields: object) -> Path:
        tensors = {name: tensor for name, tensor in (tiny_tensors() | (changes or {})).items() if tensor is not None}
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | fields))
        return tmp_path

    return write
