"""The one check of a request: name, ids and length. The doors use its parts before they pay for tokenizing.

Limits of single fields are in sampling_params.py, those of a body's shape in the ingress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from serving.priority import check_priority
from serving.router.generation import GenerationRequest, ModelCard
from serving.token_ids import check_token_ids

# Of a prompt: tokens x (1 + prompt_logprobs). They travel in one message and are written into one answer.
MAX_PROMPT_SCORES = 2**16
MAX_REQUEST_SCORES = 2**18          # of all prompts and choices of a client's request


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """The tokens that a prompt and its output may have together, and why."""

    num_tokens: int
    reason: str


def served_card(cards: Sequence[ModelCard], model: str | None) -> ModelCard:
    """Return the served model of that name; without a name the first one. Raises ModelNotFoundError."""
    for card in cards:
        if model is None or card.name == model:
            return card
    raise ModelNotFoundError(f"the model {(model or '')[:200]!r} is not served here", param="model",
                             fix=f"use one of: {', '.join(card.name for card in cards) or 'none is served yet'}")


def check_request(request: GenerationRequest, card: ModelCard, num_embeddings: int,
                  kv_limit: LengthLimit | None) -> None:
    """Raise ModelNotFoundError, InvalidRequestError or ContextLengthError for what can never run here.

    `kv_limit`: of the KV cache of the largest shard; None when no shard is known yet.
    """
    served_card((card,), request.model)
    if request.priority is not None:
        check_priority(request.priority)
    prompt, params, field = request.prompt_token_ids, request.params, request.prompt_field
    if not prompt:
        raise InvalidRequestError("the prompt has no tokens", fix="send at least one", param=field)
    check_token_ids(field, prompt, num_embeddings)
    check_token_ids("stop_token_ids", params.stop_token_ids, num_embeddings)
    check_token_ids("logit_bias", params.logit_bias, num_embeddings)
    check_length(len(prompt), params.max_tokens, context_limit(card), field)
    if kv_limit is not None:
        check_length(len(prompt), params.max_tokens, kv_limit, field)
    if _num_scores(request) > MAX_PROMPT_SCORES * params.n:
        raise InvalidRequestError(
            f"prompt_logprobs={params.prompt_logprobs} of {len(prompt)} tokens are more than {MAX_PROMPT_SCORES} "
            "log-probabilities", fix="ask for fewer, or send a shorter prompt", param="prompt_logprobs")


def check_requests(requests: Sequence[GenerationRequest], card: ModelCard, num_embeddings: int,
                   kv_limit: LengthLimit | None) -> None:
    """Check all parts of one client's request. Raises as check_request()."""
    for request in requests:
        check_request(request, card, num_embeddings, kv_limit)
    num_scores = sum(map(_num_scores, requests))
    if num_scores > MAX_REQUEST_SCORES:
        raise InvalidRequestError(
            f"the request asks for {num_scores} log-probabilities of prompts, at most {MAX_REQUEST_SCORES} may be",
            fix="send fewer prompts, or ask for fewer choices", param="prompt_logprobs")


def context_limit(card: ModelCard) -> LengthLimit:
    return LengthLimit(card.max_model_len, f"this model's maximum context length is {card.max_model_len} tokens")


def kv_cache_limit(num_tokens: int, num_bytes: int = 0) -> LengthLimit:
    """`num_bytes`: of the KV cache; 0 when unknown."""
    size = f" in {num_bytes} bytes" if num_bytes else ""
    return LengthLimit(num_tokens, f"the KV cache of this model's largest shard holds {num_tokens} tokens{size}")


def check_length(num_prompt: int, num_output: int | None, limit: LengthLimit, field: str) -> None:
    """Raise ContextLengthError when prompt and output are too long. `num_output` None: one token must be left."""
    if num_prompt + (num_output or 1) <= limit.num_tokens:
        return
    if num_output is None or num_prompt >= limit.num_tokens:
        raise prompt_too_long(f"{num_prompt}", limit, field)
    raise ContextLengthError(
        f"{limit.reason}. However, you requested {num_prompt + num_output} tokens ({num_prompt} in the prompt, "
        f"{num_output} in the completion)",
        fix=f"ask for at most {limit.num_tokens - num_prompt} tokens, or shorten the prompt", param="max_tokens")


def prompt_too_long(num_prompt: str, limit: LengthLimit, field: str) -> ContextLengthError:
    """Return the error of a prompt that leaves no room. `num_prompt` may also be "more than 100"."""
    return ContextLengthError(
        f"{limit.reason}. However, your prompt has {num_prompt} tokens, and at least one must be left for the output",
        fix=f"shorten the prompt to {limit.num_tokens - 1} tokens", param=field)


def _num_scores(request: GenerationRequest) -> int:
    if request.params.prompt_logprobs is None:
        return 0
    return request.params.n * len(request.prompt_token_ids) * (1 + request.params.prompt_logprobs)
