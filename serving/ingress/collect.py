"""Streams of deltas -> whole choices, usage, and one stream out of several."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from model.step import TokenLogprob
from serving.engine.request import FinishReason
from serving.errors import ClientGoneError, ShardFailedError
from serving.ingress.openai_responses import PromptTokensDetails, Usage
from serving.router.generation import GenerationDelta, GenerationRequest, Service

_QUEUE_SIZE = 64    # deltas; a client that reads slowly holds its sequences back, not our memory


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
        """The whole choice as if it had come at once."""
        return GenerationDelta(choice, self.text, tuple(self.token_ids), tuple(self.logprobs), self.prompt_logprobs,
                               finish_reason=self.finish_reason, stop_reason=self.stop_reason)


class UsageCount:
    """Tokens of one HTTP or gRPC request: each prompt once, the generated tokens of all its choices."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self.num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self.num_generated_tokens = 0
        self._cached_of_prompt: dict[int, int] = {}

    def add(self, prompt_index: int, delta: GenerationDelta) -> None:
        self.num_generated_tokens += len(delta.token_ids)
        if delta.num_cached_tokens is not None:
            self._cached_of_prompt.setdefault(prompt_index, delta.num_cached_tokens)

    @property
    def num_cached_tokens(self) -> int:
        return sum(self._cached_of_prompt.values())

    def to_usage(self) -> Usage:
        return Usage(prompt_tokens=self.num_prompt_tokens, completion_tokens=self.num_generated_tokens,
                     total_tokens=self.num_prompt_tokens + self.num_generated_tokens,
                     prompt_tokens_details=PromptTokensDetails(cached_tokens=self.num_cached_tokens))


@asynccontextmanager
async def open_streams(service: Service, requests: Sequence[GenerationRequest]
                       ) -> AsyncIterator[AsyncIterator[tuple[int, GenerationDelta]]]:
    """The deltas of all requests, each with its request's index. Leaving the block cancels what is still running."""
    stream = _single(service, requests[0]) if len(requests) == 1 else _merged(service, requests)
    try:
        yield stream
    finally:
        await stream.aclose()


async def _single(service: Service, request: GenerationRequest) -> AsyncGenerator[tuple[int, GenerationDelta]]:
    deltas = service.generate(request)
    try:
        async for delta in deltas:
            yield 0, _checked(delta)
    finally:
        if isinstance(deltas, AsyncGenerator):
            await deltas.aclose()


async def _merged(service: Service, requests: Sequence[GenerationRequest]
                  ) -> AsyncGenerator[tuple[int, GenerationDelta]]:
    queue: asyncio.Queue[tuple[int, GenerationDelta] | BaseException | None] = asyncio.Queue(_QUEUE_SIZE)

    async def pump(index: int) -> None:
        stream = _single(service, requests[index])
        try:
            async for _, delta in stream:
                await queue.put((index, delta))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)      # raised again by the reader below
        finally:
            await stream.aclose()

    tasks = [asyncio.create_task(pump(index)) for index in range(len(requests))]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _checked(delta: GenerationDelta) -> GenerationDelta:
    """A client knows two ways to finish; the others are errors to it."""
    if delta.finish_reason is FinishReason.FAILED:
        raise ShardFailedError("the request failed on its shard", fix="send it again")
    if delta.finish_reason is FinishReason.CANCELLED:
        raise ClientGoneError("the request was cancelled", fix="send it again")
    return delta
