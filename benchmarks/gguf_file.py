"""Writes a checkpoint of make_checkpoint.py as one GGUF file, for llama.cpp: the same bf16 weights, bit for bit.

Names and metadata as llama.cpp's convert_hf_to_gguf.py gives them for qwen3moe: norms and gates fp32, the rest bf16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

FILE_NAME = "model.gguf"
_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp"}
_EXPERT_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_SHARED_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_AS_FLOAT = ("norm", "ffn_gate_inp")


class _Tensors:
    """Reads tensors of a folder of safetensors files by name."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file_of[f"{name}.weight"].get_tensor(f"{name}.weight")
        return tensor


def write_gguf(folder: Path) -> Path:
    """Write model.gguf into the folder of a Qwen3-MoE checkpoint; what is there stays. Raises ValueError."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "qwen3_moe":
        raise ValueError(f"{folder} is {config['model_type']}: only qwen3_moe is written as GGUF")
    path = folder / FILE_NAME
    if path.exists():
        return path
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "qwen3moe")
    _add_arguments(writer, config)
    _add_tokenizer(writer, folder, config)
    for name, tensor in _named_tensors(_Tensors(folder), config):
        if any(part in name for part in _AS_FLOAT):
            writer.add_tensor(f"{name}.weight", tensor.float().numpy())
        else:
            writer.add_tensor(f"{name}.weight", _bf16_bytes(tensor), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)
    return path


def _bf16_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    contents: npt.NDArray[np.uint8] = tensor.contiguous().view(torch.int16).numpy().view(np.uint8)
    return contents


def _add_arguments(writer: gguf.GGUFWriter, config: dict[str, object]) -> None:
    writer.add_name("benchmark")
    for key, add in {
            "max_position_embeddings": writer.add_context_length, "hidden_size": writer.add_embedding_length,
            "num_hidden_layers": writer.add_block_count, "intermediate_size": writer.add_feed_forward_length,
            "num_attention_heads": writer.add_head_count, "num_key_value_heads": writer.add_head_count_kv,
            "head_dim": writer.add_key_length, "rope_theta": writer.add_rope_freq_base,
            "rms_norm_eps": writer.add_layer_norm_rms_eps, "num_experts": writer.add_expert_count,
            "num_experts_per_tok": writer.add_expert_used_count, "vocab_size": writer.add_vocab_size,
            "moe_intermediate_size": writer.add_expert_feed_forward_length}.items():
        add(config[key])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, object]) -> None:
    """Add the byte-level BPE. The vocabulary is filled up to the model's with tokens that are never read."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["id"] for token in tokenizer["added_tokens"]}
    token_of_id = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    vocab_size = int(str(config["vocab_size"]))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token_of_id.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    kinds = [gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL if index in token_of_id
             else gguf.TokenType.UNUSED for index in range(vocab_size)]
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)


def _named_tensors(tensors: _Tensors, config: dict[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    for ours, theirs in _SHARED_NAMES.items():
        yield theirs, tensors.read(ours)
    num_layers, num_experts = int(str(config["num_hidden_layers"])), int(str(config["num_experts"]))
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        for ours, theirs in _LAYER_NAMES.items():
            yield f"blk.{layer}.{theirs}", tensors.read(f"{prefix}.{ours}")
        for ours, theirs in _EXPERT_NAMES.items():
            yield f"blk.{layer}.{theirs}", torch.stack(
                [tensors.read(f"{prefix}.mlp.experts.{expert}.{ours}") for expert in range(num_experts)])
