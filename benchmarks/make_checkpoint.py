"""Random-weight checkpoints for the benchmarks: `make_checkpoint.py small|medium|wide|vast|hybrid [--gguf]`.

Qwen3-MoE, and for `hybrid` Qwen3-Next. The tokenizer is a byte-level BPE of 256 bytes, a few merges and
two special tokens, so that the checkpoint can be served; the model's vocabulary is larger, as padded vocabularies are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from model.checkpoint_writer import CheckpointWriter

INIT_STD = 0.02         # transformers' initializer_range: logits stay within a few units
EOS, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TEMPLATE = ("{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    vocab_size: int


@dataclass(frozen=True)
class HybridShape(Shape):
    """Three of four layers are gated DeltaNet."""

    shared_expert_intermediate_size: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int = 4
    full_attention_interval: int = 4
    partial_rotary_factor: float = 0.25

    @property
    def conv_width(self) -> int:
        return 2 * self.linear_num_key_heads * self.linear_key_head_dim + self.value_width

    @property
    def value_width(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 16, 8, 2, 32, 512),          # seconds on anything: checks of the benchmarks themselves
    "small": Shape(512, 8, 8, 2, 64, 32, 4, 256, 32_000),
    "small-152k": Shape(512, 8, 8, 2, 64, 32, 4, 256, 151_936),     # with as many tokens as Qwen 3
    "medium": Shape(1024, 16, 16, 4, 128, 64, 8, 384, 65_536),
    "wide": Shape(2048, 3, 32, 4, 128, 128, 8, 768, 16_384),    # three layers of Qwen3-30B-A3B, 3.7 GB
    "vast": Shape(4096, 2, 32, 4, 128, 128, 8, 1536, 8192),     # experts of Qwen3-235B-A22B, half the heads, 9.9 GB
    "hybrid": HybridShape(512, 8, 8, 2, 64, 32, 4, 256, 32_000, 256, 4, 8, 64, 64),
}


def config_of(shape: Shape) -> dict[str, object]:
    family = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "use_sliding_window": False,
              "sliding_window": None}
    if isinstance(shape, HybridShape):
        family = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
    return {
        **family, "dtype": "bfloat16", **asdict(shape),
        "intermediate_size": shape.hidden_size * 3, "hidden_act": "silu", "max_position_embeddings": 8192,
        "initializer_range": INIT_STD, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "rope_scaling": None,
        "attention_bias": False, "attention_dropout": 0.0, "use_cache": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True,
        "output_router_logits": False, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
    }


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(std=INIT_STD, generator=generator).bfloat16()


def layer_tensors(shape: Shape, layer: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer + 1)
    hidden, prefix = shape.hidden_size, f"model.layers.{layer}"
    is_linear = isinstance(shape, HybridShape) and (layer + 1) % shape.full_attention_interval != 0
    mixer = linear_attention_tensors if is_linear else attention_tensors
    tensors = {
        f"{prefix}.input_layernorm.weight": norm_weight(shape, hidden),
        f"{prefix}.post_attention_layernorm.weight": norm_weight(shape, hidden),
        **mixer(shape, prefix, generator),
        f"{prefix}.mlp.gate.weight": normal((shape.num_experts, hidden), generator),
    }
    for expert in range(shape.num_experts):
        tensors |= mlp_tensors(f"{prefix}.mlp.experts.{expert}", hidden, shape.moe_intermediate_size, generator)
    if isinstance(shape, HybridShape):
        tensors |= mlp_tensors(f"{prefix}.mlp.shared_expert", hidden, shape.shared_expert_intermediate_size, generator)
        tensors[f"{prefix}.mlp.shared_expert_gate.weight"] = normal((1, hidden), generator)
    return tensors


def norm_weight(shape: Shape, size: int) -> Tensor:
    """Return a weight that changes nothing: a hybrid's are centred at zero."""
    return (torch.zeros if isinstance(shape, HybridShape) else torch.ones)(size, dtype=torch.bfloat16)


def attention_tensors(shape: Shape, prefix: str, generator: torch.Generator) -> dict[str, Tensor]:
    hidden, head_dim = shape.hidden_size, shape.head_dim
    query, key = shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim
    query_rows = 2 * query if isinstance(shape, HybridShape) else query       # beside a hybrid's query is its gate
    return {
        f"{prefix}.self_attn.q_norm.weight": norm_weight(shape, head_dim),
        f"{prefix}.self_attn.k_norm.weight": norm_weight(shape, head_dim),
        f"{prefix}.self_attn.q_proj.weight": normal((query_rows, hidden), generator),
        f"{prefix}.self_attn.k_proj.weight": normal((key, hidden), generator),
        f"{prefix}.self_attn.v_proj.weight": normal((key, hidden), generator),
        f"{prefix}.self_attn.o_proj.weight": normal((hidden, query), generator),
    }


def linear_attention_tensors(shape: Shape, prefix: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Return those of a gated DeltaNet layer, its decay as transformers begins with it."""
    assert isinstance(shape, HybridShape)
    hidden, num_heads, kernel = shape.hidden_size, shape.linear_num_value_heads, shape.linear_conv_kernel_dim
    decay_rates_H = torch.empty(num_heads).uniform_(0.01, 16, generator=generator)
    return {
        f"{prefix}.linear_attn.in_proj_qkvz.weight": normal((shape.conv_width + shape.value_width, hidden), generator),
        f"{prefix}.linear_attn.in_proj_ba.weight": normal((2 * num_heads, hidden), generator),
        f"{prefix}.linear_attn.conv1d.weight": normal((shape.conv_width, 1, kernel), generator) * 10,
        f"{prefix}.linear_attn.A_log": decay_rates_H.log().bfloat16(),
        f"{prefix}.linear_attn.dt_bias": torch.ones(num_heads, dtype=torch.bfloat16),
        f"{prefix}.linear_attn.norm.weight": torch.ones(shape.linear_value_head_dim, dtype=torch.bfloat16),
        f"{prefix}.linear_attn.out_proj.weight": normal((hidden, shape.value_width), generator),
    }


def mlp_tensors(name: str, hidden: int, intermediate: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {f"{name}.gate_proj.weight": normal((intermediate, hidden), generator),
            f"{name}.up_proj.weight": normal((intermediate, hidden), generator),
            f"{name}.down_proj.weight": normal((hidden, intermediate), generator)}


def shared_tensors(shape: Shape, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1_000_003)
    return {
        "model.embed_tokens.weight": normal((shape.vocab_size, shape.hidden_size), generator),
        "model.norm.weight": norm_weight(shape, shape.hidden_size),
        "lm_head.weight": normal((shape.vocab_size, shape.hidden_size), generator),
    }


def write_tokenizer(writer: CheckpointWriter) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in (EOS, PAD)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator([__doc__ or "", CHAT_TEMPLATE], trainer)
    tokenizer.save(str(writer.folder / "tokenizer.json"))
    writer.add_json("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD, "bos_token": None,
        "clean_up_tokenization_spaces": False, "model_max_length": 8192, "chat_template": CHAT_TEMPLATE})
    writer.add_json("generation_config.json", {"eos_token_id": 0, "pad_token_id": 1, "do_sample": False})


def default_dir(name: str) -> Path:
    return platformdirs.user_cache_path("moesaic") / "benchmarks" / name


def make(name: str, folder: Path, seed: int = 0) -> int:
    """Write the checkpoint into `folder`, which must not exist. Returns the bytes of its weights."""
    shape = SHAPES[name]
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    writer = CheckpointWriter(unfinished, shape.num_hidden_layers + 1)
    writer.add_file(0, lambda: shared_tensors(shape, seed))
    for layer in range(shape.num_hidden_layers):
        print(f"layer {layer + 1} of {shape.num_hidden_layers}", file=sys.stderr)
        writer.add_file(layer + 1, lambda layer=layer: layer_tensors(shape, layer, seed))
    writer.add_json("config.json", config_of(shape))
    write_tokenizer(writer)
    weights_bytes = writer.finish()
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(unfinished)       # another process has made it meanwhile: the same, for it is made from the seed
    return weights_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path, help="folder to write; default NAME in the user's cache folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gguf", action="store_true", help="write model.gguf beside it too, for llama.cpp")
    parser.add_argument("--force", action="store_true", help="write again when the folder is there")
    options = parser.parse_args()
    folder = options.out or default_dir(options.name)
    if options.force and (folder / "config.json").exists():
        shutil.rmtree(folder)
    start_s, made = time.perf_counter(), not folder.exists()
    if not made and not (folder / "config.json").exists():
        parser.error(f"{folder} exists and is no checkpoint: give another --out")
    if made:
        make(options.name, folder, options.seed)
    if options.gguf:
        from gguf_file import write_gguf
        write_gguf(folder)
    weights_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(json.dumps({"benchmark": "make_checkpoint", "name": options.name, "folder": str(folder), "made": made,
                      "gguf": options.gguf,
                      "weights_bytes": weights_bytes, "seconds": round(time.perf_counter() - start_s, 2)}))


if __name__ == "__main__":
    main()
