"""The one check of a request."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serving.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from serving.router.generation import GenerationRequest, ModelCard
from serving.router.request_checks import check_request, check_requests, kv_cache_limit, served_card
from serving.sampling_params import SamplingParams

CARD = ModelCard("m", 100_000, 0)


def ask(num_prompt: int = 3, field: str = "prompt", **params: object) -> GenerationRequest:
    return GenerationRequest("id", "m", (1,) * num_prompt, SamplingParams.model_validate(params), prompt_field=field)


def test_a_model_is_found_by_name_or_as_the_first() -> None:
    other = ModelCard("other", 1, 0)
    assert served_card((CARD, other), None) is CARD and served_card((CARD, other), "other") is other
    with pytest.raises(ModelNotFoundError) as refused:
        served_card((CARD,), "x" * 10_000)
    assert len(str(refused.value)) < 300


def test_errors_name_what_the_prompt_was_made_of() -> None:
    for request in (ask(100_000, "messages"), ask(0, "messages")):
        with pytest.raises(InvalidRequestError) as refused:
            check_request(request, CARD, 10, None)
        assert refused.value.param == "messages"


@pytest.mark.parametrize(("num_context", "kv_limit", "says"), [
    (1000, None, "context length is 1000 tokens"), (1000, 50, "largest shard holds 50 tokens in 4096 bytes")])
def test_context_and_kv_cache_have_one_text(num_context: int, kv_limit: int | None, says: str) -> None:
    card, limit = ModelCard("m", num_context, 0), kv_limit or num_context
    of_cache = None if kv_limit is None else kv_cache_limit(kv_limit, 4096)
    with pytest.raises(ContextLengthError, match=f"{says}. However, you requested {limit + 1} tokens"):
        check_request(ask(1, max_tokens=limit), card, 10, of_cache)
    with pytest.raises(ContextLengthError, match=f"{says}. However, your prompt has {limit} tokens"):
        check_request(ask(limit), card, 10, of_cache)
    check_request(ask(limit - 1), card, 10, of_cache)


def test_a_priority_has_a_range() -> None:
    for priority in (None, -100, 100):
        check_request(replace(ask(), priority=priority), CARD, 10, None)
    with pytest.raises(InvalidRequestError, match="priority=101"):
        check_request(replace(ask(), priority=101), CARD, 10, None)


def test_log_probabilities_of_prompts_are_bounded_for_one_and_for_all() -> None:
    check_request(ask(60_000, prompt_logprobs=0, n=4), CARD, 10, None)
    with pytest.raises(InvalidRequestError, match="prompt_logprobs=1 of 60000 tokens are more than 65536"):
        check_request(ask(60_000, prompt_logprobs=1), CARD, 10, None)
    check_requests([ask(60_000, prompt_logprobs=0)] * 4, CARD, 10, None)
    with pytest.raises(InvalidRequestError, match="300000 log-probabilities of prompts, at most 262144"):
        check_requests([ask(60_000, prompt_logprobs=0)] * 5, CARD, 10, None)
