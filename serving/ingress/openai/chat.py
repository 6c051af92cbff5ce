"""Serve /v1/chat/completions: a body becomes a request, and its deltas an answer or a stream of chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial

from serving.errors import InvalidRequestError
from serving.ingress.build_request import Asked
from serving.ingress.caller import Caller, Stamp
from serving.ingress.chat_answer import ChatAnswer, ChatAsked, collect_chat
from serving.ingress.chat_request import ChatBuilder, ChatQuestion
from serving.ingress.collect import CollectedChoice, UsageCount, is_long
from serving.ingress.openai.answers import ChatChoice, ChatCompletion
from serving.ingress.openai.bodies import ChatCompletionBody, template_variables, to_conversation
from serving.ingress.openai.chat_message import to_message
from serving.ingress.openai.chat_stream import ChatStream
from serving.ingress.openai.logprobs import chat_logprobs, prompt_logprobs
from serving.ingress.openai.usage import to_usage
from serving.ingress.tools import to_tool_use
from serving.option_types import ToolParserName
from serving.router.generation import Service
from serving.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ChatCompletionAsked:
    body: ChatCompletionBody
    chat: ChatAsked
    stamp: Stamp


class ChatEndpoint:
    def __init__(self, service: Service, tokenizer: Tokenizer, tool_parser: ToolParserName | None = None) -> None:
        self._service = service
        self._tokenizer = tokenizer
        self._builder = ChatBuilder(service, tokenizer, tool_parser)

    async def build(self, body: ChatCompletionBody, caller: Caller, stamp: Stamp) -> ChatCompletionAsked:
        """Check the body. Raises InvalidRequestError and its kinds, ModelNotFoundError."""
        fields = body.model_copy(update={"max_tokens": _max_tokens(body)})
        asked = Asked(model=body.model, fields=fields, request_id=caller.request_id, tenant=caller.tenant(body.user),
                      num_logprobs=_num_logprobs(body), priority=body.priority, traceparent=caller.traceparent)
        if body.stream and body.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs are not part of a stream", param="prompt_logprobs",
                                      fix="remove it, or set stream to false")
        chat = await self._builder.build(ChatQuestion(
            asked, to_conversation(body.messages, body.add_generation_prompt, template_variables(body)),
            to_tool_use(body.tools, body.tool_choice, body.parallel_tool_calls),
            body.form(), body.include_reasoning is not False))
        return ChatCompletionAsked(body, chat, stamp)

    async def answer(self, asked: ChatCompletionAsked) -> ChatCompletion:
        """Return the whole answer. Raises ServingError."""
        collected, answers, usage = await collect_chat(self._service, asked.chat)
        write = partial(self._write, asked, list(zip(collected, answers, strict=True)), usage)
        return await asyncio.to_thread(write) if is_long(collected) else write()

    def _write(self, asked: ChatCompletionAsked, choices: Sequence[tuple[CollectedChoice, ChatAnswer]],
               usage: UsageCount) -> ChatCompletion:
        body, request, stamp = asked.body, asked.chat.request, asked.stamp
        return ChatCompletion(
            id=stamp.id, created=stamp.created_s, model=request.model, system_fingerprint=stamp.fingerprint,
            choices=[self._choice(index, choice, answer, body) for index, (choice, answer) in enumerate(choices)],
            usage=to_usage(usage),
            prompt_logprobs=None if body.prompt_logprobs is None else prompt_logprobs(
                self._tokenizer, choices[0][0].prompt_logprobs),
            prompt_token_ids=list(request.prompt_token_ids) if body.return_token_ids else None)

    def _choice(self, index: int, choice: CollectedChoice, answer: ChatAnswer, body: ChatCompletionBody) -> ChatChoice:
        return ChatChoice(
            index=index, message=to_message(answer.kept, answer.new_id),
            finish_reason=answer.finish_reason(choice.finish_reason), stop_reason=choice.stop_reason,
            token_ids=choice.token_ids if body.return_token_ids else None,
            logprobs=chat_logprobs(self._tokenizer, choice.logprobs) if body.logprobs else None)

    def stream(self, asked: ChatCompletionAsked) -> AsyncGenerator[bytes]:
        """Yield the chunks as JSON, the first of each choice with its role. Raises ServingError."""
        return ChatStream(asked.body, asked.chat, asked.stamp, self._tokenizer).chunks(self._service)


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
