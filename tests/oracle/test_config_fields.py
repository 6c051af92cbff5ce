"""Every field of transformers' configs, changed: what changes its logits changes our arguments or is refused by name,
what does not is silent and changes nothing. That changed arguments mean the same is test_transformers.py's."""

from __future__ import annotations

import dataclasses
import json
import logging
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from model.args import ModelArgs, parse_model_args
from model.errors import CheckpointError
from model.families import FAMILIES

SIZES: dict[str, object] = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 8, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "num_experts": 4, "head_dim": 8,
    "max_position_embeddings": 64, "shared_expert_intermediate_size": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4, "num_local_experts": 4,
    "layer_types": ["full_attention", "linear_attention"]}
# Another value of every field; more than one where one of them could hide a mistake.
OTHERS: dict[str, tuple[object, ...]] = {
    "vocab_size": (40,), "hidden_size": (24,), "num_hidden_layers": (3,), "num_attention_heads": (2,),
    "num_key_value_heads": (1, 4), "intermediate_size": (12,), "moe_intermediate_size": (12,),
    "shared_expert_intermediate_size": (12,), "num_experts": (5,), "num_local_experts": (5,),
    "num_experts_per_tok": (1, 3), "head_dim": (4,), "max_position_embeddings": (128,), "hidden_act": ("gelu", "relu"),
    "initializer_range": (0.5,), "rms_norm_eps": (0.1,), "use_cache": (False,), "tie_word_embeddings": (True,),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 9.0},
                        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
                        {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
                        {"rope_type": "proportional", "rope_theta": 10_000.0}),
    "attention_bias": (True,), "qkv_bias": (False,), "attention_dropout": (0.5,), "use_sliding_window": (True,),
    "sliding_window": (3, None), "max_window_layers": (0, 1), "decoder_sparse_step": (2,), "mlp_only_layers": ([1],),
    "norm_topk_prob": (True, False), "output_router_logits": (True,), "router_aux_loss_coef": (0.5,),
    "router_jitter_noise": (0.5,), "linear_conv_kernel_dim": (2,), "linear_key_head_dim": (8,),
    "linear_value_head_dim": (8,), "linear_num_key_heads": (1,), "linear_num_value_heads": (6,),
    "layer_types": (["linear_attention", "full_attention"], ["full_attention"] * 2),
    "pad_token_id": (3,), "bos_token_id": (3,), "eos_token_id": (3, [3, 4]), "output_hidden_states": (True,),
    "return_dict": (False,), "chunk_size_feed_forward": (2,), "is_encoder_decoder": (True,), "id2label": ({"0": "a"},),
    "label2id": ({"a": 0},), "problem_type": ("regression",), "transformers_version": ("1",), "dtype": (),
    "architectures": ()}
# Older spellings and what a config may hold beside its fields.
BESIDE: dict[str, tuple[object, ...]] = {
    "rope_theta": (9.0,), "rope_scaling": ({"type": "linear", "factor": 2.0},), "temperature": (0.5,), "top_k": (3,),
    "attn_implementation": ("eager",), "mamba_ssm_dtype": ("bfloat16",), "mtp_num_hidden_layers": (1,)}
# Refused though transformers does not look at them: a checkpoint that has them was made for a model that does.
REFUSED_ANYWAY = {"is_encoder_decoder", "use_sliding_window", "max_window_layers", "num_experts", "num_local_experts",
                  "rope_parameters"}
NAMES = ["qwen2_moe", "qwen3_moe", "mixtral", "qwen3_next", "qwen3_5_moe_text"]
TOKENS = torch.arange(12)[None] * 5 % 32


def config_class(family: str) -> Any:
    from transformers import AutoConfig
    return type(AutoConfig.for_model(family))


@cache
def base_of(family: str) -> tuple[dict[str, object], Any, Tensor, ModelArgs]:
    """Return config.json, the module, its logits and our arguments."""
    fields = {field.name for field in dataclasses.fields(config_class(family))}
    sizes = {name: value for name, value in SIZES.items() if name in fields}
    if not FAMILIES[family].has_linear_layers:
        sizes.pop("layer_types", None)
    whole = json.loads(config_class(family)(**sizes).to_json_string(use_diff=False))
    base = {name: value for name, value in whole.items() if value is not None or name == "sliding_window"}
    base["architectures"] = [FAMILIES[family].architecture]
    module = module_of(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return base, module, logits_of(module), parse_model_args(base)


def module_of(config: dict[str, object]) -> Any:
    from transformers import AutoModelForCausalLM
    content = {name: value for name, value in config.items() if name != "model_type"}
    read = config_class(str(config["model_type"])).from_dict(content)
    return AutoModelForCausalLM.from_config(read, attn_implementation="eager").eval().float()


def logits_of(module: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = module(TOKENS, return_dict=True).logits[0]
    return logits


def changes_theirs(family: str, config: dict[str, object]) -> bool | None:
    """Return whether transformers computes something else with the same weights. None: it cannot."""
    _, module, logits, _ = base_of(family)
    try:
        other = module_of(config)
        weights, known = other.state_dict(), module.state_dict()
        if {name: weight.shape for name, weight in weights.items()} != {
                name: weight.shape for name, weight in known.items()}:
            return True
        other.load_state_dict(known)
        other.tie_weights()
        return not torch.allclose(logits_of(other), logits, atol=1e-5)
    except Exception:       # of whatever kind: its own checks, or the first operation that does not work
        return None


@pytest.mark.parametrize("family", NAMES)
def test_every_field_is_honoured_refused_or_harmless(family: str, caplog: pytest.LogCaptureFixture) -> None:
    base, _, _, args = base_of(family)
    fields = [field.name for field in dataclasses.fields(config_class(family)) if field.init]
    assert set(fields) <= set(OTHERS), f"give {sorted(set(fields) - set(OTHERS))} another value above"
    wrong = []
    for name in dict.fromkeys([*fields, *BESIDE]):
        for value in (OTHERS | BESIDE)[name]:
            changed, changes = base | {name: value}, changes_theirs(family, base | {name: value})
            caplog.clear()
            try:
                ours = parse_model_args(changed)
            except CheckpointError:
                if changes is False and name not in REFUSED_ANYWAY:
                    wrong.append(f"{name}={value} is refused and changes nothing")
                continue
            if changes and ours == args:
                wrong.append(f"{name}={value} changes their logits and not our arguments")
            if changes is False and any(record.levelno >= logging.WARNING for record in caplog.records):
                wrong.append(f"{name}={value} changes nothing and is logged")
    assert not wrong, "\n".join(wrong)
