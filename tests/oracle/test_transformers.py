"""Our logits and text are those of transformers 5, for every config field that changes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.kernels.protocol import Kernels

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 32}
QWEN: dict[str, dict[str, object]] = {
    "plain": {},
    "norm_topk_prob": {"norm_topk_prob": True},
    "decoder_sparse_step": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "mlp_only_layers": {"mlp_only_layers": [0, 2]},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 8},
    "no_head_dim": {"head_dim": None, "hidden_size": 64},
    "one_kv_head": {"num_key_value_heads": 1},
    "all_kv_heads": {"num_key_value_heads": 4},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0}},
    "yarn": {"rope_parameters": YARN},
    "yarn_factors": {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0,
                                                "truncate": False}},
    "yarn_mscale": {"rope_parameters": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7}},
    "attention_bias": {"attention_bias": True},
    "sliding_window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "sliding_window_off": {"use_sliding_window": False, "sliding_window": 7},
    "rms_norm_eps": {"rms_norm_eps": 0.05},
    "top_1": {"num_experts_per_tok": 1},
    "top_all": {"num_experts_per_tok": 6},
}
MIXTRAL: dict[str, dict[str, object]] = {
    "plain": {},
    "head_dim": {"head_dim": 20},
    "tied": {"tie_word_embeddings": True},
    "sliding_window": {"sliding_window": 9},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1_000_000.0}},
    "yarn": {"head_dim": 16, "rope_parameters": YARN},
    "rms_norm_eps": {"rms_norm_eps": 0.05},
}
QWEN2: dict[str, dict[str, object]] = {
    "plain": {}, "norm_topk_prob": {"norm_topk_prob": True}, "no_bias": {"qkv_bias": False},
    "mlp_only_layers": {"mlp_only_layers": [1]}, "decoder_sparse_step": {"decoder_sparse_step": 2},
    "tied": {"tie_word_embeddings": True}, "sliding_window_off": {"use_sliding_window": False, "sliding_window": 7},
}
HYBRID: dict[str, dict[str, object]] = {
    "plain": {},
    "all_attention": {"layer_types": ["full_attention"] * 4},
    "layer_types": {"layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
    "interval": {"full_attention_interval": 2},
    "one_key_head": {"linear_num_key_heads": 1, "linear_num_value_heads": 3},
    "equal_heads": {"linear_num_key_heads": 4, "linear_num_value_heads": 4},
    "wide_heads": {"linear_key_head_dim": 40, "linear_value_head_dim": 72},
    "conv_kernel": {"linear_conv_kernel_dim": 2},
    "long_conv": {"linear_conv_kernel_dim": 7},
    "whole_rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    "half_rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    "yarn": {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
    "attention_bias": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "top_all": {"num_experts_per_tok": 6},
    "rms_norm_eps": {"rms_norm_eps": 0.05},
}
ONLY_NEXT: dict[str, dict[str, object]] = {
    "mlp_only_layers": {"mlp_only_layers": [0, 3]}, "decoder_sparse_step": {"decoder_sparse_step": 2},
    "no_norm_topk_prob": {"norm_topk_prob": False},
}
ONLY_3_5: dict[str, dict[str, object]] = {
    "mrope": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5,
                                  "mrope_interleaved": True, "mrope_section": [2, 1, 1]}},
}
FIELDS: dict[str, dict[str, dict[str, object]]] = {
    "qwen2_moe": QWEN2, "qwen3_moe": QWEN, "mixtral": MIXTRAL, "qwen3_next": HYBRID | ONLY_NEXT,
    "qwen3_5_moe_text": HYBRID | ONLY_3_5}
FAMILIES = list(FIELDS)
CASES = [(family, name) for family, cases in FIELDS.items() for name in cases]
LAYOUTS: dict[str, dict[str, object]] = {
    "per_expert": {}, "fused": {"save_original_format": False}, "sharded": {"max_shard_size": "60KB"},
    "fused_sharded": {"save_original_format": False, "max_shard_size": "60KB"}}
SaveTiny = Callable[..., Path]


def fields_of(family: str, name: str) -> dict[str, object]:
    return FIELDS[family][name]


def random_ids(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def load_theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def their_logits(module: Any, token_ids: tuple[int, ...]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = module(torch.tensor([token_ids])).logits[0].float()
    return logits


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 1          # random weights large enough that a mistake shows
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_logits_match_transformers(family: str, name: str, save_tiny: SaveTiny, engine_of: Any,
                                   kernels: Kernels) -> None:
    folder = save_tiny(family, seed=len(name), **fields_of(family, name))
    token_ids = random_ids(70)
    engine = engine_of(folder, torch.float32, kernels)
    assert_same_logits(engine.prefill_logits(token_ids), their_logits(load_theirs(folder), token_ids))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_checkpoint_layout_loads(family: str, layout: str, save_tiny: SaveTiny, engine_of: Any,
                                       kernels: Kernels) -> None:
    folder = save_tiny(family, save=LAYOUTS[layout])
    assert (folder / "model.safetensors.index.json").exists() == ("sharded" in layout)
    token_ids = random_ids(20)
    engine = engine_of(folder, torch.float32, kernels)
    assert_same_logits(engine.prefill_logits(token_ids), their_logits(load_theirs(folder), token_ids))


def rewrite_for_transformers_4(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = rope if rope["type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["rope_theta", "linear", "yarn_factors"])
def test_configs_of_transformers_4_mean_the_same(name: str, save_tiny: SaveTiny, engine_of: Any,
                                                 kernels: Kernels) -> None:
    folder = save_tiny("qwen3_moe", **QWEN[name])
    token_ids = random_ids(40)
    before = their_logits(load_theirs(folder), token_ids)
    rewrite_for_transformers_4(folder)
    assert_same_logits(their_logits(load_theirs(folder), token_ids), before)
    assert_same_logits(engine_of(folder, torch.float32, kernels).prefill_logits(token_ids), before)


@pytest.mark.parametrize("present", ["lm_head.weight", "both"])
def test_tied_weights_under_the_other_name(present: str, save_tiny: SaveTiny, engine_of: Any, kernels: Kernels) -> None:
    from safetensors.torch import load_file, save_file
    folder = save_tiny("qwen3_moe", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table.clone() if present == "lm_head.weight" else table.clone() * 0.5
    if present == "lm_head.weight":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    token_ids = random_ids(20)
    engine = engine_of(folder, torch.float32, kernels)
    assert_same_logits(engine.prefill_logits(token_ids), their_logits(load_theirs(folder), token_ids))


def first_difference(ours: tuple[int, ...], theirs: tuple[int, ...]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_in_bf16(family: str, seed: int, save_tiny: SaveTiny, engine_of: Any, kernels: Kernels) -> None:
    """Equal, or where the texts part the two tokens tie within the rounding of bf16.

    The rounding at that place is measured: how far transformers' own bf16 logits are from its fp32 ones.
    """
    folder = save_tiny(family, seed=seed, initializer_range=0.08, norm_topk_prob=True)
    prompt, num_tokens = random_ids(12, seed), 16
    module = load_theirs(folder, torch.bfloat16)
    theirs = tuple(module.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False)[0, 12:].tolist())
    ours = engine_of(folder, torch.bfloat16, kernels).generate(prompt, num_tokens)
    place = first_difference(ours, theirs)
    if place is not None:
        prefix = prompt + theirs[:place]
        exact = their_logits(load_theirs(folder), prefix)[-1]
        rounding = (their_logits(module, prefix)[-1] - exact).abs().max()
        assert exact[theirs[place]] - exact[ours[place]] <= 2 * rounding


def test_bf16_is_as_near_to_fp32_as_transformers(save_tiny: SaveTiny, engine_of: Any, kernels: Kernels) -> None:
    """Of several checkpoints together: bf16 scores of two experts are often equal, and which of them is the better one
    is chance."""
    ours, theirs = 0.0, 0.0
    for seed in range(3, 11):
        folder = save_tiny("qwen3_moe", seed=seed, initializer_range=0.08)
        token_ids = random_ids(200)
        exact = their_logits(load_theirs(folder), token_ids)
        theirs += float((their_logits(load_theirs(folder, torch.bfloat16), token_ids) - exact).abs().mean())
        ours += float((engine_of(folder, torch.bfloat16, kernels).prefill_logits(token_ids) - exact).abs().mean())
    assert ours <= 1.2 * theirs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers_on_cuda(family: str, save_tiny: SaveTiny, engine_of: Any) -> None:
    """fp32 as transformers on the CPU; bf16 about as near to it as the bf16 of transformers."""
    from model.kernels.torch_kernels import TorchKernels
    folder, token_ids = save_tiny(family, seed=3, initializer_range=0.08), random_ids(200)
    exact = their_logits(load_theirs(folder), token_ids)
    ours = engine_of(folder, torch.float32, TorchKernels("cuda")).prefill_logits(token_ids, chunk=64).cpu()
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=0)
    theirs = their_logits(load_theirs(folder, torch.bfloat16), token_ids)
    ours = engine_of(folder, torch.bfloat16, TorchKernels("cuda")).prefill_logits(token_ids).cpu()
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()
