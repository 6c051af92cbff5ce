"""fp8 in blocks is read, every other quantization is refused by name."""

from __future__ import annotations

import pytest

from model.args import parse_model_args
from model.errors import UnsupportedFieldError
from model.quantization_args import read_weight_block_size, scale_name, scale_shape

PUBLISHED: dict[str, object] = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]}


def test_what_is_published_is_read(tiny_config: dict[str, object]) -> None:
    assert read_weight_block_size({"quantization_config": PUBLISHED}) == (128, 128)
    assert read_weight_block_size({}) is read_weight_block_size({"quantization_config": None}) is None
    assert parse_model_args(tiny_config | {"quantization_config": PUBLISHED}).weight_block_size == (128, 128)
    assert parse_model_args(tiny_config).weight_block_size is None


def test_it_counts_beside_the_text_part_of_a_multimodal_config(tiny_config: dict[str, object]) -> None:
    text = {name: value for name, value in tiny_config.items()
            if name not in ("architectures", "model_type", "mlp_only_layers", "dtype")}
    multimodal = {"model_type": "qwen3_5_moe", "text_config": text | {"num_hidden_layers": 4},
                  "quantization_config": PUBLISHED}
    assert parse_model_args(multimodal).weight_block_size == (128, 128)


@pytest.mark.parametrize(("changes", "named"), [
    ({"quant_method": "gptq"}, "quantization_config"), ({"quant_method": None}, "quantization_config"),
    ({"quant_method": "compressed-tensors"}, "quantization_config"),
    ({"weight_block_size": None}, "weight_block_size"), ({"weight_block_size": [128]}, "weight_block_size"),
    ({"weight_block_size": [0, 128]}, "weight_block_size"), ({"weight_block_size": 128}, "weight_block_size"),
    ({"weight_block_size": [True, 1]}, "weight_block_size"), ({"weight_block_size": ["1", 1]}, "weight_block_size"),
    ({"activation_scheme": "static"}, "activation_scheme='static'"), ({"fmt": "e5m2"}, "fmt='e5m2'"),
    ({"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0'"), ({"expert_dtype": "fp4"}, "expert_dtype='fp4'"),
    ({"some_new_trick": [1]}, r"some_new_trick=\[1\]")])
def test_other_quantizations_are_named(tiny_config: dict[str, object], changes: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedFieldError, match=rf"config\.json: .*{named}.*not implemented.*serve such a"):
        parse_model_args(tiny_config | {"quantization_config": PUBLISHED | changes})


@pytest.mark.parametrize("value", ["fp8", [], {}, 7, {"bits": 4}])
def test_what_is_no_description_of_fp8_is_named(tiny_config: dict[str, object], value: object) -> None:
    with pytest.raises(UnsupportedFieldError, match="quantization_config"):
        parse_model_args(tiny_config | {"quantization_config": value})


def test_blocks_at_the_edges_have_a_factor_too() -> None:
    assert scale_shape((256, 128), (128, 128)) == (2, 1) and scale_shape((257, 1), (128, 128)) == (3, 1)
    assert scale_shape((6, 100, 300), (128, 64)) == (6, 1, 5)
    assert scale_name("a.weight") == "a.weight_scale_inv"
