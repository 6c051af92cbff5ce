"""Counted tokens -> the usage of OpenAI's API."""

from __future__ import annotations

from serving.ingress.collect import UsageCount
from serving.ingress.openai.answers import CompletionTokensDetails, PromptTokensDetails, Usage


def to_usage(count: UsageCount) -> Usage:
    reasoning = None if count.num_reasoning_tokens is None else CompletionTokensDetails(
        reasoning_tokens=count.num_reasoning_tokens)
    return Usage(prompt_tokens=count.num_prompt_tokens, completion_tokens=count.num_generated_tokens,
                 total_tokens=count.num_prompt_tokens + count.num_generated_tokens,
                 prompt_tokens_details=PromptTokensDetails(cached_tokens=count.num_cached_tokens),
                 completion_tokens_details=reasoning)
