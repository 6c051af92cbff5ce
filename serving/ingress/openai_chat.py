"""Serve /v1/chat/completions: a body becomes a request, and its deltas an answer or a stream of chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from functools import partial

from serving.errors import InvalidRequestError
from serving.ingress.build_request import Asked, RequestBuilder
from serving.ingress.chunk_template import ChunkTemplate, to_bytes
from serving.ingress.collect import CollectedChoice, UsageCount, is_long, open_stream
from serving.ingress.http_request import Caller, Stamp
from serving.ingress.logprobs import chat_logprobs, prompt_logprobs
from serving.ingress.openai_responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessageAnswer,
)
from serving.ingress.openai_schema import ChatCompletionBody, to_conversation, wants_continuous_usage, wants_usage
from serving.router.generation import GenerationDelta, GenerationRequest, Service
from serving.text.tokenizer import Tokenizer


class ChatEndpoint:
    def __init__(self, service: Service, tokenizer: Tokenizer) -> None:
        self._service = service
        self._tokenizer = tokenizer
        self._builder = RequestBuilder(service, tokenizer)

    async def build(self, body: ChatCompletionBody, caller: Caller) -> GenerationRequest:
        """Check the body. Raises InvalidRequestError and its kinds, ModelNotFoundError."""
        fields = body.model_copy(update={"max_tokens": _max_tokens(body)})
        asked = Asked(model=body.model, fields=fields, request_id=caller.request_id, tenant=caller.tenant(body.user),
                      num_logprobs=_num_logprobs(body))
        conversation = to_conversation(body.messages, body.add_generation_prompt, body.chat_template_kwargs)
        if body.stream and body.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs are not part of a stream", param="prompt_logprobs",
                                      fix="remove it, or set stream to false")
        (request,) = await self._builder.build(asked, [conversation])
        return request

    async def answer(self, body: ChatCompletionBody, request: GenerationRequest, stamp: Stamp) -> ChatCompletion:
        """Return the whole answer. Raises ServingError."""
        usage = UsageCount([request])
        choices = [CollectedChoice() for _ in range(request.params.n)]
        async with open_stream(self._service, [request]) as deltas:
            async for index, delta in deltas:
                usage.add(index, delta)
                choices[delta.choice].add(delta)
        write = partial(self._write, body, request, stamp, choices, usage)
        return await asyncio.to_thread(write) if is_long(choices) else write()

    def _write(self, body: ChatCompletionBody, request: GenerationRequest, stamp: Stamp,
               choices: Sequence[CollectedChoice], usage: UsageCount) -> ChatCompletion:
        return ChatCompletion(
            id=stamp.id, created=stamp.created_s, model=request.model, system_fingerprint=stamp.fingerprint,
            choices=[self._choice(index, choice, body) for index, choice in enumerate(choices)], usage=usage.to_usage(),
            prompt_logprobs=None if body.prompt_logprobs is None else prompt_logprobs(
                self._tokenizer, choices[0].prompt_logprobs),
            prompt_token_ids=list(request.prompt_token_ids) if body.return_token_ids else None)

    async def stream(self, body: ChatCompletionBody, request: GenerationRequest, stamp: Stamp
                     ) -> AsyncGenerator[bytes]:
        """Yield the chunks as JSON, the first of each choice with its role. Raises ServingError."""
        usage, counts = UsageCount([request]), wants_continuous_usage(body.stream_options)
        started: set[int] = set()

        def chunk(*choices: ChatChunkChoice) -> ChatChunk:
            shows_usage = counts or not choices
            shows_prompt = bool(body.return_token_ids) and not started
            return ChatChunk(
                id=stamp.id, created=stamp.created_s, model=request.model, system_fingerprint=stamp.fingerprint,
                choices=list(choices), usage=usage.to_usage() if shows_usage else None,
                prompt_token_ids=list(request.prompt_token_ids) if shows_prompt else None)

        shows_text_only = not (counts or body.logprobs or body.return_token_ids)
        template = ChunkTemplate(lambda index, text: chunk(
            ChatChunkChoice(index=index, delta=ChatDelta(content=text)))) if shows_text_only else None
        async with open_stream(self._service, [request]) as deltas:
            async for index, delta in deltas:
                usage.add(index, delta)
                if delta.choice not in started:
                    role = ChatDelta(role="assistant", content="")
                    yield to_bytes(chunk(ChatChunkChoice(index=delta.choice, delta=role)))
                    started.add(delta.choice)
                if template is not None and delta.text and delta.finish_reason is None:
                    yield template.write(delta.choice, delta.text)
                elif (choice := self._chunk_choice(delta, body)) is not None:
                    yield to_bytes(chunk(choice))
        if wants_usage(body.stream_options):
            yield to_bytes(chunk())

    def _choice(self, index: int, choice: CollectedChoice, body: ChatCompletionBody) -> ChatChoice:
        return ChatChoice(
            index=index, message=ChatMessageAnswer(content=choice.text), finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason, token_ids=choice.token_ids if body.return_token_ids else None,
            logprobs=chat_logprobs(self._tokenizer, choice.logprobs) if body.logprobs else None)

    def _chunk_choice(self, delta: GenerationDelta, body: ChatCompletionBody) -> ChatChunkChoice | None:
        """Return None when there is nothing to tell, for the text is held back."""
        shows_tokens = bool(delta.token_ids) and bool(body.logprobs or body.return_token_ids)
        if not (delta.text or delta.finish_reason or shows_tokens):
            return None
        return ChatChunkChoice(
            index=delta.choice, delta=ChatDelta(content=delta.text if delta.text or shows_tokens else None),
            logprobs=chat_logprobs(self._tokenizer, delta.logprobs) if body.logprobs and delta.token_ids else None,
            finish_reason=None if delta.finish_reason is None else delta.finish_reason.value,
            stop_reason=delta.stop_reason, token_ids=list(delta.token_ids) if body.return_token_ids else None)


def _max_tokens(body: ChatCompletionBody) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequestError(f"max_tokens={old} and max_completion_tokens={new} contradict each other",
                                  fix="give max_completion_tokens only", param="max_completion_tokens")
    return old if new is None else new


def _num_logprobs(body: ChatCompletionBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequestError("top_logprobs is given without logprobs", fix="set logprobs to true",
                                  param="top_logprobs")
    return None
