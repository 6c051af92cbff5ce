"""Random Qwen3-MoE checkpoints with a tokenizer, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.serving.conftest import CHATML, byte_level_tokenizer

VOCAB_SIZE = 512
MAX_CONTEXT = 512


def write_checkpoint(folder: Path, hidden_size: int = 64, num_layers: int = 3, num_experts: int = 8,
                     moe_intermediate_size: int = 32) -> int:
    """Returns the bytes of the weights. Weights of a layer's experts repeat, which nobody at work can tell."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.08).bfloat16()

    hidden, inner = hidden_size, moe_intermediate_size
    tensors = {"model.embed_tokens.weight": normal(VOCAB_SIZE, hidden), "lm_head.weight": normal(VOCAB_SIZE, hidden),
               "model.norm.weight": torch.ones(hidden).bfloat16()}
    expert = {"gate_proj": normal(inner, hidden), "up_proj": normal(inner, hidden), "down_proj": normal(hidden, inner)}
    for layer in range(num_layers):
        name = f"model.layers.{layer}"
        tensors |= {f"{name}.{norm}.weight": torch.ones(size).bfloat16() for norm, size in (
            ("input_layernorm", hidden), ("post_attention_layernorm", hidden), ("self_attn.q_norm", 16),
            ("self_attn.k_norm", 16))}
        tensors |= {f"{name}.self_attn.q_proj.weight": normal(64, hidden),
                    f"{name}.self_attn.k_proj.weight": normal(32, hidden),
                    f"{name}.self_attn.v_proj.weight": normal(32, hidden),
                    f"{name}.self_attn.o_proj.weight": normal(hidden, 64),
                    f"{name}.mlp.gate.weight": normal(num_experts, hidden)}
        for index in range(num_experts):
            tensors |= {f"{name}.mlp.experts.{index}.{part}.weight": weight.roll(index + layer, dims=0)
                        for part, weight in expert.items()}
    save_file(tensors, folder / "model.safetensors")
    _write_json(folder / "config.json", {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE, "hidden_size": hidden, "num_hidden_layers": num_layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": inner,
        "num_experts": num_experts, "num_experts_per_tok": 2, "max_position_embeddings": MAX_CONTEXT,
        "norm_topk_prob": True})
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "chat_template": CHATML, "clean_up_tokenization_spaces": False})
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))
