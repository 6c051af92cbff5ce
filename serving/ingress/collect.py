"""Gather streams of deltas into whole choices and usage."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from model.step import TokenLogprob
from serving.engine.request import FinishReason
from serving.errors import ClientGoneError, ShardFailedError
from serving.router.generation import GenerationDelta, GenerationRequest, Service

_LONG_ANSWER = 100      # choices and scored tokens


@dataclass(slots=True)
class CollectedChoice:
    """Everything that the deltas of one choice said."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, delta: GenerationDelta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    def to_delta(self, choice: int) -> GenerationDelta:
        """Return the whole choice as if it had come at once."""
        return GenerationDelta(choice, self.text, tuple(self.token_ids), tuple(self.logprobs), self.prompt_logprobs,
                               finish_reason=self.finish_reason, stop_reason=self.stop_reason)


def is_long(choices: Sequence[CollectedChoice]) -> bool:
    """Return whether writing the answer takes so long that a thread should do it."""
    num_entries = sum(1 + len(choice.logprobs) + len(choice.prompt_logprobs) for choice in choices)
    return num_entries > _LONG_ANSWER


class UsageCount:
    """Tokens of one HTTP or gRPC request: each prompt once, the generated tokens of all its choices."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self.num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self.num_generated_tokens = 0
        self.num_reasoning_tokens: int | None = None        # None: nobody tells reasoning from answers
        self._cached_of_prompt: dict[int, int] = {}

    def add(self, prompt_index: int, delta: GenerationDelta) -> None:
        self.num_generated_tokens += len(delta.token_ids)
        if delta.num_cached_tokens is not None:
            self._cached_of_prompt.setdefault(prompt_index, delta.num_cached_tokens)

    @property
    def num_cached_tokens(self) -> int:
        return sum(self._cached_of_prompt.values())


@asynccontextmanager
async def open_stream(service: Service, requests: Sequence[GenerationRequest]
                      ) -> AsyncIterator[AsyncIterator[tuple[int, GenerationDelta]]]:
    """Yield the deltas of all requests, each with its request's index. Leaving the block cancels what still runs."""
    async with aclosing(service.generate(requests)) as deltas:
        yield ((index, _checked(delta)) async for index, delta in deltas)


def _checked(delta: GenerationDelta) -> GenerationDelta:
    """Return the delta, or raise: a client knows two ways to finish, and the others are errors to it."""
    if delta.finish_reason is FinishReason.FAILED:
        raise ShardFailedError("the request failed on its shard", fix="send it again")
    if delta.finish_reason is FinishReason.CANCELLED:
        raise ClientGoneError("the request was cancelled", fix="send it again")
    return delta
