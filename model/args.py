"""Reads the facts of a checkpoint from its config.json. Pure: no torch.

Every field that changes the result is either honoured or refused by name (UnsupportedFieldError). Defaults of absent
fields are those of transformers 5 (Qwen3MoeConfig, MixtralConfig), so a folder means here what it means there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.errors import CheckpointError, UnknownArchitectureError, UnsupportedFieldError
from model.json_file import read_json_object, shown
from model.rope_args import RopeArgs, read_rope_args

logger = logging.getLogger(__name__)

ARCHITECTURES = {"Qwen3MoeForCausalLM": "qwen3_moe", "MixtralForCausalLM": "mixtral"}
Json = Mapping[str, object]
_MAX_SIZE = 2**31 - 1       # of anything that is counted: more is a slip, and some sizes become lists
_MAX_LAYERS = 10_000

_DEFAULTS: dict[str, dict[str, object]] = {
    "qwen3_moe": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "use_sliding_window": False,
        "sliding_window": 4096, "decoder_sparse_step": 1, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
        "num_experts": 128, "norm_topk_prob": False, "mlp_only_layers": [], "rope_theta": 10_000.0},
    "mixtral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": None, "num_experts_per_tok": 2,
        "num_experts": 8, "rope_theta": 1_000_000.0},
}
# Read by nobody because they change nothing at inference.
_HARMLESS = {
    "architectures", "model_type", "head_dim", "rope_parameters", "rope_scaling", "num_local_experts",
    "dtype", "torch_dtype", "transformers_version", "use_cache", "attention_dropout", "initializer_range",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "bos_token_id", "eos_token_id",
    "pad_token_id", "max_window_layers", "pretraining_tp", "auto_map", "id2label", "label2id",
    "chunk_size_feed_forward",
    "output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder", "problem_type", "is_decoder",
    "quantization_config", "partial_rotary_factor", "layer_types", "name_or_path", "original_max_position_embeddings",
}
# These would change the result and are not implemented: the values listed mean "off".
_OFF: dict[str, tuple[object, ...]] = {
    "quantization_config": (None,), "compression_config": (None,), "partial_rotary_factor": (None, 1, 1.0),
    "mlp_bias": (None, False), "shared_expert_intermediate_size": (None, 0), "num_shared_experts": (None, 0),
    "n_shared_experts": (None, 0), "routed_scaling_factor": (None, 1, 1.0), "n_group": (None, 1),
    "topk_group": (None, 1), "final_logit_softcapping": (None,), "attn_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0), "logits_scaling": (None, 1, 1.0), "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0), "attention_multiplier": (None,), "clip_qkv": (None,),
    "attention_chunk_size": (None,), "no_rope_layers": (None, []), "is_encoder_decoder": (None, False),
    "num_nextn_predict_layers": (None, 0),
}
_OFF_OF_FAMILY: dict[str, dict[str, tuple[object, ...]]] = {"mixtral": {"attention_bias": (None, False)}}


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
    attention_bias: bool
    sliding_window: int | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: RopeArgs
    rounds_gate_weights: bool           # qwen3_moe rounds them to the model's dtype, mixtral keeps fp32

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
    _refuse_what_is_not_implemented(config, family)
    fields = _Fields(config, family)
    num_experts = _num_experts(config, fields)
    num_layers, num_heads = fields.count("num_hidden_layers", 1, _MAX_LAYERS), fields.count("num_attention_heads", 1)
    hidden_size = fields.count("hidden_size")
    head_dim = fields.count("head_dim") if config.get("head_dim") is not None else hidden_size // num_heads
    max_positions = fields.count("max_position_embeddings")
    is_qwen = family == "qwen3_moe"
    args = ModelArgs(
        family=family,
        dtype=_dtype_name(config),
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if _is_null(config, "num_key_value_heads") else fields.count("num_key_value_heads"),
        head_dim=head_dim,
        intermediate_size=fields.count("intermediate_size"),
        moe_intermediate_size=fields.count("moe_intermediate_size" if is_qwen else "intermediate_size"),
        num_experts=num_experts,
        num_experts_per_tok=fields.count("num_experts_per_tok"),
        norm_topk_prob=fields.flag("norm_topk_prob") if is_qwen else True,
        moe_layers=_moe_layers(fields, num_layers, num_experts) if is_qwen else tuple(range(num_layers)),
        qk_norm=is_qwen,
        attention_bias=fields.flag("attention_bias") if is_qwen else False,
        sliding_window=_sliding_window(fields, is_qwen),
        rms_norm_eps=fields.number("rms_norm_eps"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        max_position_embeddings=max_positions,
        rope=read_rope_args(config, fields.number("rope_theta", default_only=True), max_positions),
        rounds_gate_weights=is_qwen,
    )
    _check_sizes(args)
    return args


class _Fields:
    """Reads config.json by type, with the family's defaults."""

    def __init__(self, config: Json, family: str) -> None:
        self._config = config
        self._defaults = _DEFAULTS[family]

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


def _family_of(config: Json) -> str:
    """Return the family, of which both names must speak: a Qwen3MoeForSequenceClassification is a qwen3_moe that is no
    language model."""
    known = ", ".join(f"{name} ({family})" for name, family in ARCHITECTURES.items())
    names = config.get("architectures") or []
    model_type = config.get("model_type")
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    by_name = {ARCHITECTURES[name] for name in listed if name in ARCHITECTURES}
    family = model_type if isinstance(model_type, str) else next(iter(by_name), None)
    if family not in _DEFAULTS or (names and by_name != {family}):
        raise UnknownArchitectureError(f"config.json: architectures={shown(names)}, "
                                       f"model_type={shown(model_type)} is not known",
                                       fix=f"known are {known}")
    return family


def _refuse_what_is_not_implemented(config: Json, family: str) -> None:
    for name, off in (_OFF | _OFF_OF_FAMILY.get(family, {})).items():
        value = config.get(name)
        if not any(value is allowed or value == allowed for allowed in off):
            raise UnsupportedFieldError(f"config.json: {name}={shown(value)} is not implemented for {family}",
                                        fix="serve a checkpoint without it")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedFieldError(f"config.json: hidden_act={activation!r} is not implemented",
                                    fix="only 'silu' is; serve another checkpoint")
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list) and len(set(map(str, layer_types))) > 1:
        raise UnsupportedFieldError(f"config.json: layer_types mixes {sorted(set(map(str, layer_types)))}",
                                    fix=f"{family} layers all attend alike; serve another checkpoint")
    known = set(_DEFAULTS[family]) | _HARMLESS | set(_OFF) | set(_OFF_OF_FAMILY.get(family, {}))
    for name in sorted(set(config) - known):
        if not name.startswith("_"):
            logger.warning("config_field_ignored family=%s field=%s value=%s", family, name, shown(config[name]))


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


def _sliding_window(fields: _Fields, is_qwen: bool) -> int | None:
    """transformers 5 applies a qwen3_moe window to every layer and does not read `max_window_layers`; so do we."""
    if (is_qwen and not fields.flag("use_sliding_window")) or fields.value("sliding_window") is None:
        return None
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
    if args.head_dim % 2:
        raise UnsupportedFieldError(f"config.json: head_dim={args.head_dim} is odd", fix="rotary embedding needs pairs")
    if args.moe_layers and not 1 <= args.num_experts_per_tok <= args.num_experts:
        raise CheckpointError(f"config.json: num_experts_per_tok={args.num_experts_per_tok} of "
                              f"{args.num_experts} experts", fix="correct num_experts_per_tok")
