"""A field that would change the result is refused by name, a harmless one is silent, an unknown one is logged."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from model.args import parse_model_args
from model.errors import UnsupportedFieldError
from model.families import FAMILIES

EXAMPLES = Path(__file__).parents[2] / "examples/models"


def config(family: str, **fields: object) -> dict[str, object]:
    """Return a small config.json of a family; a multimodal one's fields are the text part's."""
    inner = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, **fields}
    own = FAMILIES[family]
    return {"model_type": family, own.text_config: inner} if own.text_config else {"model_type": family, **inner}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_nothing_is_silent(family: str, caplog: pytest.LogCaptureFixture) -> None:
    harmless: dict[str, object] = {
        "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "temperature": 0.7,
        "do_sample": True, "torchscript": False, "pruned_heads": {}, "attn_implementation": "eager", "num_labels": 2,
        "output_router_logits": True, "attention_dropout": 0.1, "unsloth_version": "2026.1", "per_layer_config": None,
        "some_trick_that_is_off": False, "another": None, "eos_token_id": [1, 2], "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1, "rope_interleave": False, "scoring_func": "softmax", "n_group": 1}
    if family == "mixtral":
        del harmless["sliding_window"]      # it has no use_sliding_window: a window is one
    with caplog.at_level(logging.WARNING):
        assert parse_model_args(config(family, **harmless)) == parse_model_args(config(family))
    assert not caplog.records


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_published_configs_are_silent(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_model_args(json.loads(path.read_text()))
    assert not caplog.records


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "value"), [
    ("per_layer_config", {"0": {"rms_norm_eps": 0.1}}), ("scoring_func", "sigmoid"), ("swiglu_limit", 7.0),
    ("first_k_dense_replace", 1), ("rope_interleave", True), ("q_lora_rank", 64), ("output_gate_type", "sigmoid"),
    ("routed_scaling_factor", 2.5), ("hidden_act", "gelu"), ("hidden_act", []), ("is_encoder_decoder", True)])
def test_what_would_change_the_result_is_refused(family: str, name: str, value: object) -> None:
    with pytest.raises(UnsupportedFieldError, match=rf"{name}=.* is not implemented"):
        parse_model_args(config(family, **{name: value}))


def test_what_one_family_has_is_refused_in_another() -> None:
    for family, name, value in (
            ("qwen3_next", "attn_output_gate", False), ("qwen3_moe", "attn_output_gate", True),
            ("qwen3_next", "use_sliding_window", True), ("qwen3_moe", "use_qk_norm", False),
            ("mixtral", "use_qk_norm", True), ("mixtral", "qkv_bias", True), ("qwen2_moe", "use_sliding_window", True),
            ("qwen3_moe", "shared_expert_intermediate_size", 64)):
        with pytest.raises(UnsupportedFieldError, match=f"{name}=.* is not implemented for {family}"):
            parse_model_args(config(family, **{name: value}))
    parse_model_args(config("qwen3_next", attn_output_gate=True, output_gate_type="swish"))


def test_layers_attend_alike_and_as_the_window_says() -> None:
    sliding, full = ["sliding_attention"] * 4, ["full_attention"] * 4
    window = {"use_sliding_window": True, "sliding_window": 8}
    assert parse_model_args(config("qwen3_moe", layer_types=sliding, **window)).sliding_window == 8
    assert parse_model_args(config("qwen2_moe", layer_types=full)).sliding_window is None
    for family, layer_types in (("qwen2_moe", sliding), ("qwen3_moe", sliding), ("mixtral", sliding),
                                ("qwen3_moe", [*sliding[:2], *full[:2]]), ("mixtral", "full_attention")):
        with pytest.raises(UnsupportedFieldError, match="layer_types"):
            parse_model_args(config(family, layer_types=layer_types))


@pytest.mark.parametrize(("family", "fields"), [
    ("qwen3_moe", {"head_dim": 264}), ("qwen3_moe", {"num_experts": 40_000}),
    ("qwen3_next", {"linear_key_head_dim": 264}), ("qwen3_5_moe", {"linear_conv_kernel_dim": 17})])
def test_what_is_too_large_for_kernels_is_refused_with_value_and_limit(family: str, fields: dict[str, int]) -> None:
    (name, value), = fields.items()
    with pytest.raises(UnsupportedFieldError, match=rf"{name}={value} is above .*{name} up to \d+"):
        parse_model_args(config(family, **fields))


def test_what_nothing_is_known_of_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_model_args(config("qwen3_next", some_new_trick=3, _private=1))
    assert [record.getMessage() for record in caplog.records] == [
        "config_field_ignored family=qwen3_next field=some_new_trick value=3"]
