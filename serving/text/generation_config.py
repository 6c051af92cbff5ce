"""Read and judge what a checkpoint's generation_config.json recommends where a client says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue, ValidationError

from serving.sampling_params import SamplingParams
from serving.text.token_bytes import TokenizerError

_FILE = "generation_config.json"
_FIX = f"correct it in {_FILE}, or remove it"
_READ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_TOP_K_OFF = (0, -1)
# Not implemented -> the values that mean "off". Another value changes answers elsewhere and not here, which is said.
_UNUSED: dict[str, tuple[JsonValue, ...]] = {
    "bad_words_ids": ([],), "begin_suppress_tokens": ([],), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "guidance_scale": (1.0,), "max_new_tokens": (), "min_length": (0,), "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,), "num_beams": (1,), "penalty_alpha": (0.0,), "sequence_bias": ({}, []),
    "stop_strings": ([],), "suppress_tokens": ([],), "top_h": (), "typical_p": (1.0,),
}


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Values where a client says none; None is the API's default. As in vLLM the values count whatever `do_sample`
    says."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def sampling_defaults(config: Mapping[str, JsonValue]) -> SamplingDefaults:
    """Return the defaults that the file gives; null is not given. Raises TokenizerError for a value that no client
    may send either: otherwise every request would be refused for what its sender has not said."""
    given = {name: config[name] for name in _READ if config.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TokenizerError(f"{_FILE}: {name}={value!r} is not a number", fix=_FIX)
    if given.get("top_k") in _TOP_K_OFF:
        del given["top_k"]
    try:
        params = SamplingParams.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        raise TokenizerError(f"{_FILE}: {found['loc'][0]}={found['input']!r}: {found['msg']}", fix=_FIX) from None
    return SamplingDefaults(**{name: getattr(params, name) for name in given})


def stated_eos_token_ids(generation_config: Mapping[str, JsonValue], model_config: Mapping[str, JsonValue]
                         ) -> tuple[int, ...]:
    """Return generation_config.json's ids; where it says nothing, config.json's. Raises TokenizerError."""
    stated, file = generation_config.get("eos_token_id"), _FILE
    if stated is None:
        stated, file = model_config.get("eos_token_id"), "config.json"
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    whole = [token_id for token_id in ids if isinstance(token_id, int) and not isinstance(token_id, bool)]
    if len(whole) < len(ids):
        raise TokenizerError(f"{file}: eos_token_id={stated!r} is not a token id, or a list of them",
                             fix=f"correct it in {file}")
    return tuple(whole)


def unused_fields(config: Mapping[str, JsonValue]) -> tuple[str, ...]:
    """Return `name=value` for what the file asks for and nothing here does."""
    return tuple(f"{name}={config[name]!r}" for name, off in _UNUSED.items()
                 if config.get(name) is not None and config[name] not in off)
