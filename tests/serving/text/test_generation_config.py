"""Values of generation_config.json are honoured, or refused when it is read; never blamed on a client."""

from __future__ import annotations

import pytest
from pydantic import JsonValue

from serving.sampling_params import SamplingParams
from serving.text.generation_config import SamplingDefaults, sampling_defaults, stated_eos_token_ids, unused_fields
from serving.text.token_bytes import TokenizerError

FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@pytest.mark.parametrize(("config", "expected"), [
    ({}, SamplingDefaults()), (dict.fromkeys(FIELDS), SamplingDefaults()),
    ({"temperature": 0, "top_p": 0, "top_k": 50}, SamplingDefaults(temperature=0.0, top_p=0.0, top_k=50)),
    ({"top_k": 0}, SamplingDefaults()), ({"top_k": -1}, SamplingDefaults()),
    ({"top_k": 20.0}, SamplingDefaults(top_k=20)),
    ({"min_p": 0.05, "repetition_penalty": 1.1, "do_sample": False},
     SamplingDefaults(min_p=0.05, repetition_penalty=1.1))])
def test_values_are_read(config: dict[str, JsonValue], expected: SamplingDefaults) -> None:
    assert sampling_defaults(config) == expected


@pytest.mark.parametrize("value", ["0.7", True, [0.7], {}, -2, 2.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", FIELDS)
def test_values_that_no_client_may_send_are_refused_by_name(name: str, value: JsonValue) -> None:
    with pytest.raises(TokenizerError, match=rf"generation_config\.json: {name}=.*correct it in"):
        sampling_defaults({name: value})


def test_every_default_is_something_that_a_request_may_say() -> None:
    assert set(FIELDS) == set(SamplingDefaults.__dataclass_fields__) <= set(SamplingParams.model_fields)


def test_eos_ids_are_the_generation_configs_then_the_models() -> None:
    assert stated_eos_token_ids({"eos_token_id": [2, 0]}, {"eos_token_id": 5}) == (2, 0)
    assert stated_eos_token_ids({"eos_token_id": None}, {"eos_token_id": 5}) == (5,)
    assert stated_eos_token_ids({}, {}) == ()
    with pytest.raises(TokenizerError, match=r"^config\.json: eos_token_id='2'"):
        stated_eos_token_ids({}, {"eos_token_id": "2"})


def test_what_nothing_here_does_is_said() -> None:
    assert unused_fields({"num_beams": 1, "no_repeat_ngram_size": 0, "typical_p": 1, "bad_words_ids": None}) == ()
    assert unused_fields({"num_beams": 4, "max_new_tokens": 99}) == ("max_new_tokens=99", "num_beams=4")
