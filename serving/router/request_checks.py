"""What the service refuses before a request waits for anything. Limits of single fields are in sampling_params.py."""

from __future__ import annotations

from collections.abc import Iterable

from serving.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from serving.router.generation import GenerationRequest, ModelCard


def check_request(request: GenerationRequest, card: ModelCard, vocab_size: int, max_request_tokens: int | None) -> None:
    """Raises ModelNotFoundError, InvalidRequestError or ContextLengthError. `max_request_tokens`: what the KV cache of
    the largest shard holds; None when no shard is known yet."""
    if request.model != card.name:
        raise ModelNotFoundError(f"the model {request.model!r} does not exist here", fix=f"use {card.name!r}",
                                 param="model")
    if not request.prompt_token_ids:
        raise InvalidRequestError("the prompt has no tokens", fix="send at least one", param="prompt")
    params = request.params
    _check_ids("prompt", request.prompt_token_ids, vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_ids("logit_bias", params.logit_bias, vocab_size)
    _check_length(request, card.max_model_len, f"this model's maximum context length is {card.max_model_len} tokens")
    if max_request_tokens is not None:
        _check_length(request, max_request_tokens,
                      f"the KV cache of this model's largest shard holds {max_request_tokens} tokens")


def _check_ids(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
    if wrong is not None:
        raise InvalidRequestError(f"{param} holds the token id {wrong}, which is not in the vocabulary",
                                  fix=f"token ids are 0 to {vocab_size - 1}", param=param)


def _check_length(request: GenerationRequest, max_tokens: int, limit: str) -> None:
    num_prompt, num_output = len(request.prompt_token_ids), request.params.max_tokens
    if num_prompt + (num_output or 1) <= max_tokens:
        return
    if num_output is None or num_prompt >= max_tokens:
        raise ContextLengthError(
            f"{limit}. However, your prompt has {num_prompt} tokens, and at least one must be left for the output",
            fix=f"shorten the prompt to {max_tokens - 1} tokens", param="prompt")
    raise ContextLengthError(
        f"{limit}. However, you requested {num_prompt + num_output} tokens ({num_prompt} in the prompt, {num_output} "
        "in the completion)", fix=f"ask for at most {max_tokens - num_prompt} tokens, or shorten the prompt",
        param="max_tokens")
