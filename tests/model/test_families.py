"""A family is what transformers says of it, and refuses by name what it does not implement."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from model.args import parse_model_args
from model.errors import CheckpointError, UnknownArchitectureError, UnsupportedFieldError
from model.families import FAMILIES, served_families

HYBRIDS = ["qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe"]
TINY: dict[str, object] = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16,
                           "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2}


def config(family: str, **fields: object) -> dict[str, object]:
    content = TINY | fields
    return {"model_type": family, **({"text_config": content} if family == "qwen3_5_moe" else content)}


@pytest.mark.parametrize(("family", "config_class"), [
    ("qwen2_moe", transformers.Qwen2MoeConfig), ("qwen3_moe", transformers.Qwen3MoeConfig),
    ("mixtral", transformers.MixtralConfig), ("qwen3_next", transformers.Qwen3NextConfig),
    ("qwen3_5_moe_text", transformers.Qwen3_5MoeTextConfig)])
def test_absent_fields_have_the_defaults_of_transformers(family: str, config_class: Any) -> None:
    theirs = config_class().to_dict()
    for name, value in FAMILIES[family].defaults.items():
        if name in theirs and name not in ("layer_types", "mlp_only_layers", "sliding_window"):
            assert theirs[name] == value, name


@pytest.mark.parametrize("family", HYBRIDS)
def test_which_layers_attend(family: str) -> None:
    assert parse_model_args(config(family)).linear_layers == (0, 1, 2)
    assert parse_model_args(config(family, full_attention_interval=2)).attention_layers == (1, 3)
    kinds = ["full_attention", "linear_attention", "full_attention", "linear_attention"]
    assert parse_model_args(config(family, layer_types=kinds)).linear_layers == (1, 3)


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize(("fields", "named"), [
    ({"layer_types": ["linear_attention"] * 4}, "all layers are linear"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types"),
    ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ({"full_attention_interval": 0}, "full_attention_interval"),
    ({"linear_num_value_heads": 5, "linear_num_key_heads": 2}, "value heads"),
    ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim|convolution"),
    ({"partial_rotary_factor": 0.2}, "rotated"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config")])
def test_wrong_or_unknown_layers_are_named(family: str, fields: dict[str, object], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        parse_model_args(config(family, **fields))


def test_what_qwen3_5_does_not_have_is_refused() -> None:
    for fields in ({"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}, {"norm_topk_prob": False}):
        assert parse_model_args(config("qwen3_next", **fields))
        with pytest.raises(UnsupportedFieldError, match=next(iter(fields))):
            parse_model_args(config("qwen3_5_moe_text", **fields))


def test_the_text_part_of_a_multimodal_checkpoint() -> None:
    content = config("qwen3_5_moe") | {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "dtype": "bfloat16",
                                       "tie_word_embeddings": True, "vision_config": {"depth": 2}}
    args = parse_model_args(content)
    assert (args.family, args.dtype, args.tie_word_embeddings) == ("qwen3_5_moe", "bfloat16", True)
    with pytest.raises(CheckpointError, match="text_config"):
        parse_model_args({"model_type": "qwen3_5_moe"})


def test_other_families_are_told_which_are_served() -> None:
    with pytest.raises(UnknownArchitectureError) as error:
        parse_model_args({"model_type": "llama"})
    assert served_families() in str(error.value) and "Qwen3NextForCausalLM (qwen3_next)" in served_families()
