"""Tiny random hybrids, saved by transformers: text models, multimodal ones, and copies of either in blocks of fp8."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.quantization_args import scale_name, scale_shape

TEXT: dict[str, object] = {
    "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 40, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20,
    "num_experts": 6, "num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12, "max_position_embeddings": 256, "initializer_range": 0.1}
VISION: dict[str, object] = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 48,
    "num_position_embeddings": 16}
# Linear layers that publishers leave as they are, beside whatever is no matrix of at least two rows.
_NOT_IN_FP8 = ("embed_tokens", "lm_head", "mlp.gate.", "shared_expert_gate", "in_proj_ba", "in_proj_a.", "in_proj_b.",
               "conv1d", "visual", "mtp.")


def save_hybrid(folder: Path, family: str, save: dict[str, object] | None = None, dtype: torch.dtype = torch.bfloat16,
                **fields: object) -> Path:
    from transformers import AutoModelForCausalLM, Qwen3_5MoeTextConfig, Qwen3NextConfig
    config_class = {"qwen3_next": Qwen3NextConfig, "qwen3_5_moe_text": Qwen3_5MoeTextConfig}[family]
    return _save(AutoModelForCausalLM.from_config(config_class(**TEXT | fields)), folder, dtype, save)


def save_multimodal(folder: Path, save: dict[str, object] | None = None, dtype: torch.dtype = torch.bfloat16,
                    **fields: object) -> Path:
    """A Qwen3_5MoeForConditionalGeneration with a small vision tower."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration
    config = Qwen3_5MoeConfig(text_config=TEXT | fields, vision_config=VISION)
    return _save(Qwen3_5MoeForConditionalGeneration(config), folder, dtype, save)


def _save(module: Any, folder: Path, dtype: torch.dtype, save: dict[str, object] | None) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise * 0.2 if parameter.ndim == 1 else noise * 0.1)
    module.to(dtype).save_pretrained(folder, **(save or {}))
    return folder


def store_in_fp8(folder: Path, target: Path, block_size: tuple[int, int], **quantization: object) -> Path:
    """Write a copy whose linear layers are in blocks of fp8; `quantization` changes its config."""
    target.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.ndim < 2 or any(part in name for part in _NOT_IN_FP8):
            tensors[name] = weight
        else:
            tensors[name], tensors[scale_name(name)] = quantized(weight, block_size)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic",
                                     "weight_block_size": list(block_size)} | quantization
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def quantized(weight: Tensor, block_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return [..., N, K] in fp8 and the factors of its blocks, whose largest values are as large as fp8 can hold."""
    factors_shape = scale_shape(tuple(weight.shape), block_size)
    matrices = weight.float().reshape(-1, *weight.shape[-2:])
    stored, factors = torch.empty_like(matrices), torch.empty(math.prod(factors_shape[:-2]), *factors_shape[-2:])
    for index, matrix in enumerate(matrices):
        for row in range(factors_shape[-2]):
            for column in range(factors_shape[-1]):
                at = (slice(row * block_size[0], (row + 1) * block_size[0]),
                      slice(column * block_size[1], (column + 1) * block_size[1]))
                factors[index, row, column] = matrix[at].abs().max() / torch.finfo(torch.float8_e4m3fn).max
                stored[index][at] = matrix[at] / factors[index, row, column]
    return stored.to(torch.float8_e4m3fn).reshape(weight.shape), factors.reshape(factors_shape)
