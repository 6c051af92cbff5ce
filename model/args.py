"""Reads the facts of a checkpoint from its config.json. Pure: no torch.

Every field that changes the result is either honoured or refused by name (UnsupportedFieldError). Defaults of absent
fields are those of transformers 5 (Qwen3MoeConfig, MixtralConfig), so a folder means here what it means there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.config_fields import has_window, refuse_what_is_not_implemented
from model.errors import CheckpointError, UnknownArchitectureError, UnsupportedFieldError
from model.families import FAMILIES, Family, served_families
from model.json_file import read_json_object, shown
from model.kernels.limits import above_limit
from model.quantization_args import read_weight_block_size
from model.rope_args import RopeArgs, read_rope_args

Json = Mapping[str, object]
_MAX_SIZE = 2**31 - 1       # of anything that is counted: more is a slip, and some sizes become lists
_MAX_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class LinearAttentionArgs:
    """Sizes of the gated DeltaNet layers. A sequence's state there does not grow with its length."""

    num_key_heads: int
    num_value_heads: int                # a multiple of num_key_heads
    key_head_dim: int
    value_head_dim: int
    conv_kernel_size: int               # tokens that the causal convolution looks at, the newest included

    @property
    def key_width(self) -> int:
        return self.num_key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: query, key and value."""
        return 2 * self.key_width + self.value_width

    @property
    def state_size(self) -> int:
        """Elements of a sequence's recurrent state in one layer."""
        return self.num_value_heads * self.key_head_dim * self.value_head_dim


@dataclass(frozen=True, slots=True)
class ModelArgs:
    """Holds the facts that the forward pass and the planner need. Sizes are counts of elements."""

    family: str
    dtype: str                          # of the checkpoint: "bfloat16", "float16" or "float32"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int              # of dense layers
    moe_intermediate_size: int          # of one expert
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    moe_layers: tuple[int, ...]         # layers with experts, ascending; the others are dense
    qk_norm: bool
    qkv_bias: bool
    out_bias: bool                      # of attention's output projection
    sliding_window: int | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: RopeArgs
    rounds_gate_weights: bool           # to the model's dtype; else they stay fp32
    linear_layers: tuple[int, ...] = () # gated DeltaNet instead of attention, ascending
    linear: LinearAttentionArgs | None = None   # None: no such layers
    shared_expert_size: int = 0         # intermediate size of the expert beside every MoE layer's; 0: none
    gated_attention: bool = False       # attention's output times sigmoid of a gate
    zero_centered_norms: bool = False   # a norm multiplies by 1 + weight
    weight_block_size: tuple[int, int] | None = None    # weights may be stored in fp8, in such blocks; None: not so

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated, the first ones."""
        return int(self.head_dim * self.rope.rotary_factor)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that have keys and values in the KV cache, ascending."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.linear_layers)

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def context_limit(self) -> int:
        """Return the tokens that a sequence may have, prompt and output."""
        return self.rope.context_limit(self.max_position_embeddings)

    def moe_layer_index(self, layer: int) -> int | None:
        """Return the layer's index among the MoE layers (the `layer` of a Placement), or None for a dense layer."""
        return self.moe_layers.index(layer) if layer in self.moe_layers else None


def read_model_args(checkpoint_dir: Path) -> ModelArgs:
    """Read and check config.json. Raises CheckpointError and its kinds."""
    path = Path(checkpoint_dir) / "config.json"
    try:
        return parse_model_args(read_json_object(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not there", fix="give the folder of a Hugging Face checkpoint") from error


def parse_model_args(config: Json) -> ModelArgs:
    """Check the content of config.json and return its facts. Raises CheckpointError and its kinds."""
    family = _family_of(config)
    config = _text_config(config, family)
    refuse_what_is_not_implemented(config, family)
    fields = _Fields(config, family)
    num_experts = _num_experts(config, fields)
    num_layers, num_heads = fields.count("num_hidden_layers", 1, _MAX_LAYERS), fields.count("num_attention_heads", 1)
    hidden_size = fields.count("hidden_size")
    head_dim = fields.count("head_dim") if fields.value("head_dim") is not None else hidden_size // max(1, num_heads)
    max_positions = fields.count("max_position_embeddings")
    rotary_factor = fields.number("partial_rotary_factor", default_only=True) if family.has_linear_layers else None
    rope = read_rope_args(config, fields.number("rope_theta", default_only=True), max_positions, rotary_factor)
    linear_layers = _linear_layers(fields, num_layers) if family.has_linear_layers else ()
    args = ModelArgs(
        family=family.name,
        dtype=_dtype_name(config),
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if _is_null(config, "num_key_value_heads") else fields.count("num_key_value_heads"),
        head_dim=head_dim,
        intermediate_size=fields.count("intermediate_size"),
        moe_intermediate_size=fields.count(family.expert_width),
        num_experts=num_experts,
        num_experts_per_tok=fields.count("num_experts_per_tok"),
        norm_topk_prob=fields.flag("norm_topk_prob") if family.norm_topk_prob is None else family.norm_topk_prob,
        moe_layers=_moe_layers(fields, num_layers, num_experts),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias is not None and fields.flag(family.qkv_bias),
        out_bias=family.out_bias is not None and fields.flag(family.out_bias),
        sliding_window=_sliding_window(fields) if has_window(config, family) else None,
        rms_norm_eps=fields.number("rms_norm_eps"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        max_position_embeddings=max_positions,
        rope=rope,
        rounds_gate_weights=family.rounds_gate_weights,
        linear_layers=linear_layers,
        linear=_linear_args(fields) if linear_layers else None,
        shared_expert_size=fields.count("shared_expert_intermediate_size") if family.has_shared_expert else 0,
        gated_attention=family.has_gated_attention,
        zero_centered_norms=family.has_zero_centered_norms,
        weight_block_size=read_weight_block_size(config),
    )
    _check_sizes(args)
    return args


def _text_config(config: Json, family: Family) -> Json:
    """The language model's part of a multimodal config.json; what stands outside of it counts where it says nothing."""
    if family.text_config is None:
        return config
    inner = config.get(family.text_config)
    if not isinstance(inner, dict):
        raise CheckpointError(f"config.json: {family.text_config}={shown(inner)} is not an object",
                              fix="fetch the checkpoint again")
    outside = {name: config[name] for name in ("dtype", "torch_dtype", "quantization_config")
               if config.get(name) is not None}
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    return outside | {name: value for name, value in inner.items() if value is not None or name not in outside} | tied


def _linear_layers(fields: _Fields, num_layers: int) -> tuple[int, ...]:
    kinds = fields.value("layer_types")
    if kinds is None:
        interval = fields.count("full_attention_interval")
        if interval == 0:
            raise _wrong_type("full_attention_interval", interval, "a whole number >= 1")
        return tuple(layer for layer in range(num_layers) if (layer + 1) % interval)
    known = ("linear_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise _wrong_type("layer_types", kinds, f"a list of {num_layers} of {', '.join(known)}")
    return tuple(layer for layer, kind in enumerate(kinds) if kind == known[0])


def _linear_args(fields: _Fields) -> LinearAttentionArgs:
    sizes = [fields.count(f"linear_{name}") for name in (
        "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")]
    if min(sizes) < 1 or sizes[1] % sizes[0]:
        raise CheckpointError(f"config.json: linear attention of {sizes[0]} key and {sizes[1]} value heads of "
                              f"{sizes[2]} and {sizes[3]}, convolution over {sizes[4]} tokens",
                              fix="all must be >= 1, and the value heads a multiple of the key heads")
    return LinearAttentionArgs(*sizes)


class _Fields:
    """Reads config.json by type, with the family's defaults."""

    def __init__(self, config: Json, family: Family) -> None:
        self._config = config
        self._defaults = family.defaults

    def value(self, name: str, *, default_only: bool = False) -> object:
        return self._defaults.get(name) if default_only else self._config.get(name, self._defaults.get(name))

    def count(self, name: str, least: int = 0, most: int = _MAX_SIZE) -> int:
        value = self.value(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _wrong_type(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, *, default_only: bool = False) -> float:
        value = self.value(name, default_only=default_only)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise _wrong_type(name, value, "a number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if not isinstance(value, bool):
            raise _wrong_type(name, value, "true or false")
        return value


def _wrong_type(name: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"config.json: {name}={shown(value)} is not {wanted}", fix="correct it, or fetch it again")


def _is_null(config: Json, name: str) -> bool:
    return name in config and config[name] is None


def _family_of(config: Json) -> Family:
    """Return the family, of which both names must speak: a Qwen3MoeForSequenceClassification is a qwen3_moe that is no
    language model."""
    names = config.get("architectures") or []
    model_type = config.get("model_type")
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    by_name = {family.name for family in FAMILIES.values() if family.architecture in listed}
    family = model_type if isinstance(model_type, str) else next(iter(by_name), None)
    if family not in FAMILIES or (names and by_name != {family}):
        raise UnknownArchitectureError(f"config.json: architectures={shown(names)}, "
                                       f"model_type={shown(model_type)} is not known",
                                       fix=f"known are {served_families()}")
    return FAMILIES[family]


def _num_experts(config: Json, fields: _Fields) -> int:
    """Read either spelling: transformers writes `num_local_experts`, older qwen3_moe folders say `num_experts`."""
    spelled = [name for name in ("num_experts", "num_local_experts") if config.get(name) is not None]
    if not spelled:
        return fields.count("num_experts")
    counts = {name: fields.count(name) for name in spelled}
    if len(set(counts.values())) > 1:
        raise CheckpointError(f"config.json contradicts itself: {counts}", fix="keep the one that the tensors have")
    return counts[spelled[0]]


def _moe_layers(fields: _Fields, num_layers: int, num_experts: int) -> tuple[int, ...]:
    dense = fields.value("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise _wrong_type("mlp_only_layers", dense, "a list of layer numbers")
    step = fields.count("decoder_sparse_step")
    if step == 0:
        raise _wrong_type("decoder_sparse_step", step, "a whole number >= 1")
    return tuple(layer for layer in range(num_layers)
                 if layer not in dense and num_experts > 0 and (layer + 1) % step == 0)


def _sliding_window(fields: _Fields) -> int:
    """transformers 5 applies a qwen3_moe window to every layer and does not read `max_window_layers`; so do we.

    A qwen2_moe has one in its later layers only, which is refused unless the window is switched off."""
    window = fields.count("sliding_window")
    if window == 0:
        raise _wrong_type("sliding_window", window, "null or a whole number >= 1")
    return window


def _dtype_name(config: Json) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("bfloat16", "float16", "float32"):
        raise UnsupportedFieldError(f"config.json: dtype={name!r} is not implemented",
                                    fix="known are bfloat16, float16 and float32")
    return name


def _check_sizes(args: ModelArgs) -> None:
    used = ["vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "max_position_embeddings"]
    used += ["moe_intermediate_size"] if args.moe_layers else []
    used += ["intermediate_size"] if args.num_moe_layers < args.num_layers else []
    for name in used:
        if getattr(args, name) < 1:
            raise _wrong_type(name, getattr(args, name), "a whole number >= 1")
    if not 0 < args.rms_norm_eps < math.inf:
        raise _wrong_type("rms_norm_eps", args.rms_norm_eps, "a number above 0")
    if args.num_heads % args.num_kv_heads:
        raise CheckpointError(f"config.json: {args.num_heads} attention heads do not divide over "
                              f"{args.num_kv_heads} key/value heads", fix="correct num_key_value_heads")
    if args.head_dim % 2 or args.rotary_dim % 2 or not 0 < args.rotary_dim <= args.head_dim:
        raise UnsupportedFieldError(f"config.json: {args.rotary_dim} of the head_dim={args.head_dim} "
                                    "are rotated", fix="rotary embedding needs pairs")
    linear = args.linear
    too_large = above_limit(args.head_dim, args.num_experts, *(
        (0, 0) if linear is None else (linear.key_head_dim, linear.conv_kernel_size)))
    if too_large is not None:
        name, value, limit = too_large
        raise UnsupportedFieldError(f"config.json: {name}={value} is above {limit}, the most that kernels take",
                                    fix=f"serve a checkpoint with {name} up to {limit}")
    if args.linear_layers and not args.attention_layers:
        raise UnsupportedFieldError("config.json: all layers are linear attention", fix="at least one must attend")
    if args.moe_layers and not 1 <= args.num_experts_per_tok <= args.num_experts:
        raise CheckpointError(f"config.json: num_experts_per_tok={args.num_experts_per_tok} of "
                              f"{args.num_experts} experts", fix="correct num_experts_per_tok")
