"""The model families: how each reads config.json, and what its layers are. Pure: no torch.

A family is a description, not code: the decoder builds whatever the description says. Defaults of absent fields are
those of transformers 5, so a folder means here what it means there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Allowed = Mapping[str, tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type` of config.json."""

    name: str
    architecture: str                           # of a checkpoint that is this language model
    defaults: Mapping[str, object]              # of fields that are absent
    off: Allowed = field(default_factory=dict)  # fields that are not implemented: the values that mean "off"
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")      # gate, up, down
    expert_width: str = "moe_intermediate_size"         # the field that says how wide an expert is
    norm_topk_prob: bool | None = None          # None: a field says
    qkv_bias: str | None = None                 # the field that says whether q, k, v have a bias; None: they have not
    out_bias: str | None = None
    qk_norm: bool = False
    rounds_gate_weights: bool = True            # False: the gate's weights stay fp32 whatever the model's dtype
    has_shared_expert: bool = False             # beside every MoE layer's experts, behind a gate of its own
    has_linear_layers: bool = False             # `layer_types` may say "linear_attention": gated DeltaNet
    has_gated_attention: bool = False           # attention's output times sigmoid of a gate that comes with the query
    has_zero_centered_norms: bool = False       # a norm multiplies by 1 + weight, in fp32
    splits_linear_projections: bool = False     # in_proj_qkv, _z, _b, _a; else in_proj_qkvz and _ba, by key head
    text_config: str | None = None              # the field that holds the language model of a multimodal checkpoint
    skipped_prefixes: tuple[str, ...] = ()      # of weights that text does not need


_QWEN = {"hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
         "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 10_000.0}
_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_DELTA_NET = {"attention_bias": False, "head_dim": 256, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
              "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
              "layer_types": None, "full_attention_interval": 4, "partial_rotary_factor": 0.25}
_QWEN3_5 = _QWEN | _DELTA_NET | {
    "vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16,
    "num_key_value_heads": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8, "num_experts": 256, "intermediate_size": 0}
# The fields of qwen3_next that qwen3_5_moe does not have: every layer has experts, weights always add up to 1.
_NOT_IN_QWEN3_5: Allowed = {"mlp_only_layers": (None, []), "decoder_sparse_step": (None, 1),
                            "norm_topk_prob": (None, True), "attn_output_gate": (None, True)}


def _qwen3_5(name: str, architecture: str, text_config: str | None) -> Family:
    return Family(name, architecture, _QWEN3_5, off=_NOT_IN_QWEN3_5, norm_topk_prob=True, qkv_bias="attention_bias",
                  out_bias="attention_bias", qk_norm=True, has_shared_expert=True, has_linear_layers=True,
                  has_gated_attention=True, has_zero_centered_norms=True, splits_linear_projections=True,
                  text_config=text_config, skipped_prefixes=("mtp.", "model.visual.", "visual.", "model.mtp."))


FAMILIES: dict[str, Family] = {family.name: family for family in (
    Family("qwen2_moe", "Qwen2MoeForCausalLM", _QWEN | _WINDOW | {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": False,
        "qkv_bias": True}, qkv_bias="qkv_bias", has_shared_expert=True,
        off={"use_sliding_window": (None, False)}),      # its first layers have no window
    Family("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN | _WINDOW | {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 4, "attention_bias": False, "moe_intermediate_size": 768,
        "num_experts_per_tok": 8, "num_experts": 128, "norm_topk_prob": False},
        qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=True),
    Family("mixtral", "MixtralForCausalLM", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": None, "num_experts_per_tok": 2,
        "num_experts": 8, "rope_theta": 1_000_000.0, "decoder_sparse_step": 1, "mlp_only_layers": []},
        off={"attention_bias": (None, False), "mlp_only_layers": (None, []), "decoder_sparse_step": (None, 1)},
        expert_names=("w1", "w3", "w2"), expert_width="intermediate_size", norm_topk_prob=True,
        rounds_gate_weights=False),
    Family("qwen3_next", "Qwen3NextForCausalLM", _QWEN | _DELTA_NET | {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "num_experts_per_tok": 10, "num_experts": 512, "norm_topk_prob": True},
        qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=True, has_shared_expert=True,
        has_linear_layers=True, has_gated_attention=True, has_zero_centered_norms=True, skipped_prefixes=("mtp.",)),
    _qwen3_5("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", None),
    _qwen3_5("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "text_config"),
)}


def served_families() -> str:
    """Name the families and their architectures, for errors and documents."""
    return ", ".join(f"{family.architecture} ({family.name})" for family in FAMILIES.values())
