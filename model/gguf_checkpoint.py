"""Reads a dense llama-architecture GGUF file as Hugging Face names it: tensors, config and tokenizer.

Only what llama.cpp writes for llama models with a gpt2-style byte-level BPE tokenizer; anything else is refused.
Sources: the GGUF format's key names, and llama.cpp's convert_hf_to_gguf.py (names, permutation of Q and K).
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from model.errors import CheckpointError, UnknownArchitectureError

_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
_SHARED_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
                 "output.weight": "lm_head.weight"}
_CONTROL_TOKEN = "3"            # gguf.TokenType.CONTROL

Value = TypeVar("Value", int, float, str)


class GgufCheckpoint:
    """Maps a GGUF file into memory; a tensor is dequantized when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.path = path
        architecture = self.get("general.architecture", str)
        if architecture != "llama":
            raise UnknownArchitectureError(f"{path} has architecture {architecture!r}", fix="give a llama GGUF file")
        self.num_layers = self.get("llama.block_count", int)
        self.num_heads = self.get("llama.attention.head_count", int)
        self.num_kv_heads = self.get("llama.attention.head_count_kv", int)

    def get(self, key: str, kind: type[Value]) -> Value:
        """Return the metadata value of `key`, checked to be a `kind`."""
        field = self._reader.get_field(key)
        if field is None:
            raise CheckpointError(f"{self.path} has no metadata {key!r}", fix="fetch the file again")
        content = field.contents()
        if not isinstance(content, kind):
            raise CheckpointError(f"{self.path}: {key} is {type(content).__name__}", fix=f"{kind.__name__} is expected")
        return content

    def strings(self, key: str) -> list[str]:
        """Return the metadata value of `key`, an array, each item as text."""
        field = self._reader.get_field(key)
        if field is None:
            raise CheckpointError(f"{self.path} has no metadata {key!r}", fix="fetch the file again")
        return [str(item) for item in field.contents()]

    @property
    def is_tied(self) -> bool:
        return "output.weight" not in self._tensors

    def shared_tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return embedding, last norm and, unless tied, the output head."""
        return {name: self._read(ours).to(dtype) for ours, name in _SHARED_NAMES.items() if ours in self._tensors}

    def layer_tensors(self, layer: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the nine tensors of one layer by their Hugging Face llama names."""
        tensors: dict[str, torch.Tensor] = {}
        for ours, name in _LAYER_NAMES.items():
            weight = self._read(f"blk.{layer}.{ours}.weight")
            if ours in ("attn_q", "attn_k"):
                weight = _unpermute(weight, self.num_heads if ours == "attn_q" else self.num_kv_heads)
            tensors[f"model.layers.{layer}.{name}.weight"] = weight.to(dtype)
        return tensors

    def llama_config(self) -> dict[str, object]:
        """Return config.json of the dense model, as transformers' LlamaConfig reads it."""
        hidden_size = self.get("llama.embedding_length", int)
        if self.get("llama.rope.dimension_count", int) * self.num_heads != hidden_size:
            raise CheckpointError(f"{self.path} rotates only a part of each head", fix="give a plain llama GGUF file")
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "vocab_size": self.get("llama.vocab_size", int), "hidden_size": hidden_size,
            "intermediate_size": self.get("llama.feed_forward_length", int), "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads, "num_key_value_heads": self.num_kv_heads,
            "head_dim": hidden_size // self.num_heads, "hidden_act": "silu", "attention_dropout": 0.0,
            "max_position_embeddings": self.get("llama.context_length", int),
            # GGUF keeps these two in fp32: 9.999999747378752e-06 was 1e-05 in the original.
            "rms_norm_eps": float(np.format_float_positional(
                np.float32(self.get("llama.attention.layer_norm_rms_epsilon", float)), unique=True)),
            "rope_theta": float(np.float32(self.get("llama.rope.freq_base", float))),
            "rope_scaling": None, "tie_word_embeddings": self.is_tied, "use_cache": True, "initializer_range": 0.02,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id", int),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id", int),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id", int),
        }

    def tokenizer(self) -> Tokenizer:
        """Return a byte-level BPE that splits digits one by one, as the SmolLM models use it."""
        kind, splitter = self.get("tokenizer.ggml.model", str), self.get("tokenizer.ggml.pre", str)
        if (kind, splitter) != ("gpt2", "smollm"):
            raise CheckpointError(f"{self.path} has tokenizer {kind!r} with pre-tokenizer {splitter!r}",
                                  fix="only gpt2 with smollm is read")
        tokens = self.strings("tokenizer.ggml.tokens")
        pairs = [merge.split(" ") for merge in self.strings("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)},
                                         merges=[(left, right) for left, right in pairs]))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.decoder = decoders.ByteLevel()
        token_types = self.strings("tokenizer.ggml.token_type")
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                      for token, token_type in zip(tokens, token_types, strict=True)
                                      if token_type == _CONTROL_TOKEN])
        return tokenizer

    def tokenizer_config(self) -> dict[str, object]:
        """Return tokenizer_config.json: the special tokens by name, and the chat template."""
        tokens = self.strings("tokenizer.ggml.tokens")
        named = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id",
                 "unk_token": "unknown_token_id"}
        return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "add_prefix_space": False, "model_max_length": self.get("llama.context_length", int),
                "chat_template": self.get("tokenizer.chat_template", str),
                **{name: tokens[self.get(f"tokenizer.ggml.{key}", int)] for name, key in named.items()}}

    def _read(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}", fix="fetch the file again")
        tensor = self._tensors[name]
        return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def _unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder rows [H * d, D]: llama.cpp interleaves the two rotary halves of a head, Hugging Face does not."""
    rows, columns = weight.shape
    interleaved = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return interleaved.transpose(1, 2).reshape(rows, columns)
