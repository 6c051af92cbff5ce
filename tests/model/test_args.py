"""Every field of config.json that changes the result is honoured or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from model.args import ModelArgs, parse_model_args, read_model_args
from model.errors import CheckpointError, UnknownArchitectureError, UnsupportedFieldError

MIXTRAL: dict[str, object] = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}


def test_reads_a_folder(write_tiny: Callable[..., Path]) -> None:
    args = read_model_args(write_tiny())
    assert (args.family, args.num_layers, args.num_experts, args.moe_intermediate_size) == ("qwen3_moe", 2, 4, 16)
    assert args.moe_layers == (1,) and args.num_moe_layers == 1
    assert args.moe_layer_index(0) is None and args.moe_layer_index(1) == 0


@pytest.mark.parametrize("content", [None, "", "{", "[]", "\"text\"", "[" * 100_000])
def test_unreadable_config(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_model_args(tmp_path)


@pytest.mark.parametrize(("model_type", "architecture"), [("qwen3_moe", "Qwen3MoeForCausalLM"),
                                                          ("mixtral", "MixtralForCausalLM")])
def test_absent_fields_have_the_defaults_of_transformers(model_type: str, architecture: str) -> None:
    from transformers import AutoConfig
    theirs = AutoConfig.for_model(model_type)
    ours = parse_model_args({"model_type": model_type, "architectures": [architecture]})
    full = parse_model_args(json.loads(theirs.to_json_string(use_diff=False)) | {"architectures": [architecture]})
    assert ours == full


def test_both_spellings_of_the_number_of_experts(tiny_config: dict[str, object]) -> None:
    expected = parse_model_args(tiny_config)
    assert parse_model_args(_without(tiny_config, "num_experts") | {"num_local_experts": 4}) == expected
    assert parse_model_args(tiny_config | {"num_local_experts": 4}) == expected
    with pytest.raises(CheckpointError, match="contradicts"):
        parse_model_args(tiny_config | {"num_local_experts": 5})


def _without(config: dict[str, object], *names: str) -> dict[str, object]:
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize("fields", [
    {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    {"architectures": ["Qwen3MoeForSequenceClassification"]},
    {"architectures": ["MixtralForCausalLM"]},
    {"architectures": None, "model_type": "qwen2"},
    {"architectures": None, "model_type": None}, {"architectures": [{}]}, {"architectures": [["x"]], "model_type": []},
    {"architectures": 7}, {"architectures": "Qwen3MoeForCausalLM"},
])
def test_unknown_architecture_lists_the_known_ones(tiny_config: dict[str, object], fields: dict[str, object]) -> None:
    with pytest.raises(UnknownArchitectureError, match=r"Qwen3MoeForCausalLM.*MixtralForCausalLM"):
        parse_model_args(tiny_config | fields)


@pytest.mark.parametrize(("name", "value"), [
    ("quantization_config", {"quant_method": "fp8"}), ("hidden_act", "gelu"), ("partial_rotary_factor", 0.5),
    ("shared_expert_intermediate_size", 64), ("routed_scaling_factor", 2.5), ("final_logit_softcapping", 30.0),
    ("mlp_bias", True), ("dtype", "float8_e4m3fn"), ("layer_types", ["full_attention", "sliding_attention"]),
    ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}), ("rope_scaling", {"type": "llama3", "factor": 8.0}),
    ("rope_parameters", {"rope_type": "default", "mrope_section": [1, 2, 3]}),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.25}), ("head_dim", 7),
])
def test_fields_that_would_change_the_result_are_refused(tiny_config: dict[str, object], name: str,
                                                         value: object) -> None:
    with pytest.raises(UnsupportedFieldError, match=f"{name.split('_')[0]}|rotary"):
        parse_model_args(tiny_config | {name: value})


def test_attention_bias_is_of_qwen_only(tiny_config: dict[str, object]) -> None:
    assert parse_model_args(tiny_config | {"attention_bias": True}).qkv_bias
    with pytest.raises(UnsupportedFieldError, match="attention_bias"):
        parse_model_args(MIXTRAL | {"attention_bias": True})


def test_off_values_of_refused_fields_pass(tiny_config: dict[str, object]) -> None:
    off = {"quantization_config": None, "partial_rotary_factor": 1.0, "routed_scaling_factor": 1, "mlp_bias": False,
           "rope_scaling": None, "layer_types": ["full_attention"] * 2}
    assert parse_model_args(tiny_config | off) == parse_model_args(tiny_config)


@pytest.mark.parametrize(("name", "value"), [
    ("hidden_size", "32"), ("hidden_size", -1), ("hidden_size", 0), ("hidden_size", True), ("vocab_size", 1.5),
    ("num_experts_per_tok", 5), ("num_experts_per_tok", 0), ("num_key_value_heads", 3), ("rms_norm_eps", None),
    ("tie_word_embeddings", 1), ("mlp_only_layers", "0"), ("decoder_sparse_step", 0), ("rope_theta", "big"),
    ("rope_scaling", {"type": "linear"}), ("rope_parameters", [1]), ("num_hidden_layers", 0), ("rope_theta", 0),
    ("rope_theta", float("nan")), ("rms_norm_eps", -1e-6), ("rms_norm_eps", float("inf")),
    ("max_position_embeddings", 0), ("moe_intermediate_size", 0), ("intermediate_size", 0),
    ("rope_scaling", {"type": "linear", "factor": 0}), ("rope_scaling", {"type": "yarn", "factor": float("inf")}),
    ("rope_scaling", {"type": "yarn", "factor": 2.0, "beta_fast": 0}),
    ("rope_scaling", {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}),
    ("rope_scaling", {"type": "yarn", "factor": 2.0, "truncate": "no"}),
    ("rope_scaling", {"type": "yarn", "original_max_position_embeddings": 0.5}), ("num_attention_heads", 0),
    ("rope_scaling", {"type": "linear", "factor": 1e308}), ("num_hidden_layers", 10**9), ("hidden_size", 10**30),
])
def test_wrong_values_are_named(tiny_config: dict[str, object], name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match="config.json"):
        parse_model_args(tiny_config | {name: value})


@pytest.mark.parametrize(("fields", "window"), [
    ({"use_sliding_window": True, "sliding_window": 5}, 5), ({"use_sliding_window": False, "sliding_window": 5}, None),
    ({"use_sliding_window": True, "sliding_window": None}, None), ({"use_sliding_window": True}, 4096)])
def test_sliding_window_of_qwen(tiny_config: dict[str, object], fields: dict[str, object], window: int | None) -> None:
    assert parse_model_args(tiny_config | fields).sliding_window == window


def test_a_window_of_mixtral_has_no_switch() -> None:
    assert parse_model_args(MIXTRAL | {"use_sliding_window": False, "sliding_window": 9}).sliding_window == 9
    assert parse_model_args(MIXTRAL | {"use_sliding_window": True}).sliding_window is None


def test_moe_layers(tiny_config: dict[str, object]) -> None:
    def layers(**fields: object) -> tuple[int, ...]:
        args: ModelArgs = parse_model_args(tiny_config | {"num_hidden_layers": 6} | fields)
        return args.moe_layers
    assert layers() == (1, 2, 3, 4, 5)
    assert layers(mlp_only_layers=None) == tuple(range(6))
    assert layers(mlp_only_layers=[3], decoder_sparse_step=2) == (1, 5)
