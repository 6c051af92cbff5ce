"""Facts of a checkpoint's quantization, read from its config.json. Pure: no torch.

One kind is known, fp8 as Qwen and DeepSeek publish it: weights in float8_e4m3fn, and beside each such weight the
factors of its blocks. Which weights are stored so, each tensor says itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from model.errors import UnsupportedFieldError
from model.json_file import shown

_KNOWN = "block-quantized fp8 (quant_method 'fp8' with a weight_block_size) is implemented"
_HARMLESS = {"quant_method", "weight_block_size", "modules_to_not_convert", "modules_to_convert", "ignored_layers",
             "dequantize"}
# The values of other fields that change nothing here.
_OFF: dict[str, tuple[object, ...]] = {
    "activation_scheme": (None, "dynamic"), "fmt": (None, "e4m3", "float8_e4m3fn"), "scale_fmt": (None, "float"),
    "expert_dtype": (None, "fp8")}


def read_weight_block_size(config: Mapping[str, object]) -> tuple[int, int] | None:
    """Return the rows and columns of a block that has one factor, or None for a checkpoint that is not quantized.

    Raises UnsupportedFieldError for any other quantization, and for a field that would change the result."""
    given = config.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("quant_method") != "fp8":
        raise _refused("quantization_config", given)
    for name in sorted(set(given) - _HARMLESS, key=str):
        if given[name] not in _OFF.get(name, (None,)):
            raise _refused(f"quantization_config.{name}", given[name])
    size = given.get("weight_block_size")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise _refused("quantization_config.weight_block_size", size)
    return size[0], size[1]


def scale_name(weight_name: str) -> str:
    """Return the name of the tensor that holds the factors of a weight's blocks."""
    return weight_name + "_scale_inv"


def scale_shape(weight_shape: tuple[int, ...], block_size: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of a weight's factors: one for each block, those at the edges included, which may be smaller."""
    *before, num_rows, num_columns = weight_shape
    return (*before, -(-num_rows // block_size[0]), -(-num_columns // block_size[1]))


def _refused(name: str, value: object) -> UnsupportedFieldError:
    return UnsupportedFieldError(f"config.json: {name}={shown(value)} is not implemented",
                                 fix=f"{_KNOWN}; serve such a checkpoint, or one that is not quantized")
