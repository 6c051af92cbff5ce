"""The chunks of one streamed chat."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from serving.ingress.caller import Stamp
from serving.ingress.chat_answer import ChatAnswer, ChatAsked
from serving.ingress.collect import UsageCount, open_stream
from serving.ingress.openai.answers import ChatChunk, ChatChunkChoice, ChatDelta
from serving.ingress.openai.bodies import ChatCompletionBody, wants_continuous_usage, wants_usage
from serving.ingress.openai.chat_message import to_delta
from serving.ingress.openai.chunk_template import ChunkTemplate, to_bytes
from serving.ingress.openai.logprobs import chat_logprobs
from serving.ingress.openai.usage import to_usage
from serving.router.generation import GenerationDelta, Service
from serving.text.answers.parts import Content, Part, Reasoning
from serving.text.tokenizer import Tokenizer


class ChatStream:
    def __init__(self, body: ChatCompletionBody, asked: ChatAsked, stamp: Stamp, tokenizer: Tokenizer) -> None:
        self._body, self._asked, self._stamp, self._tokenizer = body, asked, stamp, tokenizer
        self._usage = UsageCount([asked.request])
        self._counts = wants_continuous_usage(body.stream_options)
        self._shows_tokens = bool(body.return_token_ids)
        self._is_plain = not (self._counts or body.logprobs)
        self._answers: dict[int, ChatAnswer] = {}
        self._templates: dict[type[Part], ChunkTemplate] = {}   # made after the first chunk, which shows the prompt

    async def chunks(self, service: Service) -> AsyncGenerator[bytes]:
        async with open_stream(service, [self._asked.request]) as deltas:
            async for index, delta in deltas:
                self._usage.add(index, delta)
                if delta.choice not in self._answers:
                    role = ChatDelta(role="assistant", content="")
                    yield to_bytes(self._chunk(ChatChunkChoice(index=delta.choice, delta=role)))
                    self._answers[delta.choice] = ChatAnswer(self._asked)
                if (written := self._write(delta, self._answers[delta.choice].read(delta))) is not None:
                    yield written
        if wants_usage(self._body.stream_options):
            yield to_bytes(self._chunk())

    def _write(self, delta: GenerationDelta, parts: list[Part]) -> bytes | None:
        """Return None when there is nothing to tell, for the text is held back."""
        if self._is_plain and delta.finish_reason is None and len(parts) <= 1:
            (part,) = parts or (Content(""),)
            if isinstance(part, (Content, Reasoning)) and (part.text or (self._shows_tokens and delta.token_ids)):
                return self._template(type(part)).write(delta.choice, part.text, delta.token_ids)
        choice = self._choice(delta, parts)
        return None if choice is None else to_bytes(self._chunk(choice))

    def _template(self, kind: type[Part]) -> ChunkTemplate:
        if kind not in self._templates:
            def make(index: int, text: str, token_ids: list[int] | None) -> ChatChunk:
                said = ChatDelta(content=text) if kind is Content else ChatDelta(reasoning_content=text, reasoning=text)
                return self._chunk(ChatChunkChoice(index=index, delta=said, token_ids=token_ids))
            self._templates[kind] = ChunkTemplate(make, self._shows_tokens)
        return self._templates[kind]

    def _chunk(self, *choices: ChatChunkChoice) -> ChatChunk:
        shows_prompt = self._shows_tokens and not self._answers
        request, stamp = self._asked.request, self._stamp
        if self._asked.rules.format.thinks:
            self._usage.num_reasoning_tokens = sum(answer.num_reasoning_tokens for answer in self._answers.values())
        return ChatChunk(
            id=stamp.id, created=stamp.created_s, model=request.model, system_fingerprint=stamp.fingerprint,
            choices=list(choices), usage=to_usage(self._usage) if self._counts or not choices else None,
            prompt_token_ids=list(request.prompt_token_ids) if shows_prompt else None)

    def _choice(self, delta: GenerationDelta, parts: Sequence[Part]) -> ChatChunkChoice | None:
        body = self._body
        shows_tokens = bool(delta.token_ids) and bool(body.logprobs or body.return_token_ids)
        if not (parts or delta.finish_reason or shows_tokens):
            return None
        said = to_delta(parts, self._asked.new_id)
        if shows_tokens and not parts:
            said = ChatDelta(content="")
        return ChatChunkChoice(
            index=delta.choice, delta=said,
            logprobs=chat_logprobs(self._tokenizer, delta.logprobs) if body.logprobs and delta.token_ids else None,
            finish_reason=self._answers[delta.choice].finish_reason(delta.finish_reason),
            stop_reason=delta.stop_reason, token_ids=list(delta.token_ids) if body.return_token_ids else None)
