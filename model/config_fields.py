"""Says of every field of config.json whether something reads it, it changes nothing, or it must be off. Pure: no torch.

What would change the result and is not implemented is refused by name. The lists are those of transformers 5: the
fields of its configs, those that older versions wrote, and those by which models of other families differ.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from model.errors import UnsupportedFieldError
from model.families import Allowed, Family
from model.json_file import shown

logger = logging.getLogger(__name__)

Json = Mapping[str, object]

# Read elsewhere in model/, beside those that a family has defaults for.
_READ = {
    "architectures", "model_type", "head_dim", "rope_parameters", "rope_scaling", "num_local_experts", "dtype",
    "torch_dtype", "quantization_config", "partial_rotary_factor", "layer_types", "original_max_position_embeddings",
    "text_config"}
# Facts of training, of files and of programs.
_HARMLESS = {
    "transformers_version", "use_cache", "attention_dropout", "initializer_range", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "max_window_layers", "pretraining_tp", "auto_map", "id2label",
    "label2id", "num_labels", "problem_type", "chunk_size_feed_forward", "output_attentions", "output_hidden_states",
    "return_dict", "is_decoder", "name_or_path", "tie_last_hidden_states", "torchscript", "pruned_heads",
    "tie_encoder_decoder", "cross_attention_hidden_size", "finetuning_task", "prefix", "task_specific_params",
    "use_bfloat16", "tf_legacy_loss", "tokenizer_class", "model_max_length", "attn_implementation",
    "experts_implementation", "use_flash_attn", "unsloth_fixed", "unsloth_version", "sliding_window",
    "intermediate_size", "full_attention_interval", "mamba_ssm_dtype",   # states are fp32 here whatever it says
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "vision_config",
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "language_model_only",
    "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"}
# How older versions of transformers stored what to generate: generation_config.json counts, for them as for us.
_GENERATION = {
    "max_length", "max_new_tokens", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"}
# These would change the result and are not implemented: the values listed mean "off".
_NONE: tuple[object, ...] = (None,)
_NO: tuple[object, ...] = (None, False, 0)
_ONE: tuple[object, ...] = (None, 1)
_OFF: Allowed = {
    "compression_config": _NONE, "per_layer_config": (None, {}), "is_encoder_decoder": _NO, "add_cross_attention": _NO,
    "mlp_bias": _NO, "use_bias": _NO, "lm_head_bias": _NO, "clip_qkv": _NONE, "alibi": _NO,
    "num_shared_experts": _NO, "n_shared_experts": _NO, "first_k_dense_replace": _NO, "moe_layer_freq": _ONE,
    "interleave_moe_layer_step": _ONE, "zero_expert_num": _NO, "num_nextn_predict_layers": _NO,
    "routed_scaling_factor": _ONE, "n_group": _ONE, "topk_group": _ONE, "topk_method": (None, "greedy"),
    "scoring_func": (None, "softmax"), "use_routing_bias": _NO, "swiglu_limit": _NONE,
    "final_logit_softcapping": _NONE, "attn_logit_softcapping": _NONE, "query_pre_attn_scalar": _NONE,
    "logit_scale": _ONE, "logits_scaling": _ONE, "embedding_multiplier": _ONE, "residual_multiplier": _ONE,
    "attention_multiplier": _NONE, "use_parallel_residual": _NO, "attention_chunk_size": _NONE,
    "no_rope_layers": (None, []), "no_rope_layer_interval": _NO, "rope_local_base_freq": _NONE,
    "rope_interleave": _NO, "rope_interleaved": _NO, "rotary_pct": _ONE, "rotary_percent": _ONE, "rotary_dim": _NONE,
    "sliding_window_pattern": _NONE, "add_swa_attention_sink_bias": _NO, "add_full_attention_sink_bias": _NO,
    "q_lora_rank": _NONE, "kv_lora_rank": _NONE,
}


def refuse_what_is_not_implemented(config: Json, family: Family) -> None:
    """Raise UnsupportedFieldError for a field that would change the result; log those that nothing is known of."""
    off = {**_OFF, **_off_of(family)}
    for name, allowed_values in off.items():
        value = config.get(name)
        if not any(value is allowed or value == allowed for allowed in allowed_values):
            raise UnsupportedFieldError(f"config.json: {name}={shown(value)} is not implemented for {family.name}",
                                        fix="serve a checkpoint without it")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedFieldError(f"config.json: hidden_act={shown(activation)} is not implemented",
                                    fix="only 'silu' is; serve another checkpoint")
    if not family.has_linear_layers:
        _refuse_layers_that_differ(config, family)
    known = set(family.defaults) | _READ | _HARMLESS | _GENERATION | set(off)
    for name in sorted(set(config) - known):
        if not name.startswith("_") and config[name] not in (None, False, "", [], {}):
            logger.warning("config_field_ignored family=%s field=%s value=%s", family.name, name, shown(config[name]))


def has_window(config: Json, family: Family) -> bool:
    """Return whether attention looks back only so far: where a family has no `use_sliding_window`, a length says so."""
    fields = {**family.defaults, **config}
    switched_off = "use_sliding_window" in family.defaults and fields["use_sliding_window"] is False
    return not family.has_linear_layers and fields.get("sliding_window") is not None and not switched_off


def _off_of(family: Family) -> Allowed:
    """Return the values that mean "off", or "as in this family", of fields that only some families honour."""
    off: dict[str, tuple[object, ...]] = {
        "use_qk_norm": (None, family.qk_norm), "qk_layernorm": (None, family.qk_norm),
        "attn_output_gate": (None, family.has_gated_attention)}
    if not family.has_shared_expert:
        off["shared_expert_intermediate_size"] = _NO
    if family.has_linear_layers:
        off |= {"output_gate_type": (None, "swish", "silu"), "use_sliding_window": _NO}    # of gated DeltaNet's norm
    else:
        off |= {"partial_rotary_factor": _ONE, "output_gate_type": _NONE}
    for name in ("qkv_bias", "attention_bias"):
        if name not in (family.qkv_bias, family.out_bias):
            off[name] = _NO
    return {**off, **family.off}


def _refuse_layers_that_differ(config: Json, family: Family) -> None:
    """Refuse `layer_types` other than attention of one kind, with a window where there is one."""
    layer_types = config.get("layer_types")
    if layer_types is None:
        return
    kinds = sorted(set(map(str, layer_types))) if isinstance(layer_types, list) else [shown(layer_types)]
    if kinds != ["full_attention"] and kinds != ["sliding_attention"]:
        raise UnsupportedFieldError(f"config.json: layer_types mixes {kinds}",
                                    fix=f"{family.name} layers all attend alike; serve another checkpoint")
    if kinds == ["sliding_attention"] and not has_window(config, family):
        raise UnsupportedFieldError("config.json: layer_types says sliding_attention, and there is no sliding_window",
                                    fix="correct one of them")
