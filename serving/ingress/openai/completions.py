"""Serve /v1/completions: one or several prompts, as text or token ids, an answer or a stream of chunks."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from serving.engine.request import FinishReason
from serving.errors import InvalidRequestError
from serving.ingress.body_bounds import MAX_CHOICES, MAX_PROMPTS, MAX_REPEATED_TOKENS
from serving.ingress.build_request import Asked, RequestBuilder
from serving.ingress.caller import Caller, Stamp
from serving.ingress.collect import CollectedChoice, UsageCount, is_long, open_stream
from serving.ingress.openai.answers import Completion, CompletionChoice, CompletionLogprobs
from serving.ingress.openai.bodies import CompletionBody, to_prompts, wants_continuous_usage, wants_usage
from serving.ingress.openai.chunk_template import ChunkTemplate, to_bytes
from serving.ingress.openai.logprobs import CompletionLogprobsWriter, prompt_logprobs
from serving.ingress.openai.usage import to_usage
from serving.ingress.prompts import Prompt, Text
from serving.ingress.structured_output import grammar_of
from serving.router.generation import GenerationDelta, GenerationRequest, Service
from serving.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class PromptRequest:
    request: GenerationRequest
    echo: str               # the prompt's text, when the answer is to begin with it


@dataclasses.dataclass(frozen=True, slots=True)
class CompletionAsked:
    body: CompletionBody
    prompts: Sequence[PromptRequest]
    stamp: Stamp

    @property
    def requests(self) -> list[GenerationRequest]:
        return [prompt.request for prompt in self.prompts]

    @property
    def n(self) -> int:
        """Return the number of choices of each prompt."""
        return self.prompts[0].request.params.n


class CompletionEndpoint:
    def __init__(self, service: Service, tokenizer: Tokenizer) -> None:
        self._service = service
        self._tokenizer = tokenizer
        self._builder = RequestBuilder(service, tokenizer)

    async def build(self, body: CompletionBody, caller: Caller, stamp: Stamp) -> CompletionAsked:
        """Make one request for each prompt. Raises InvalidRequestError and its kinds, ModelNotFoundError."""
        prompts = to_prompts(body)
        _check(body, len(prompts))
        # echo with max_tokens 0 asks for the prompt's scores; a step draws at least one token, which is left out.
        fields = body.model_copy(update={
            "max_tokens": 1 if _only_scores(body) else body.max_tokens,
            "prompt_logprobs": body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs})
        asked = Asked(model=body.model, fields=fields, request_id=caller.request_id, tenant=caller.tenant(body.user),
                      num_logprobs=body.logprobs, grammar=await grammar_of(body.form(), body) or "",
                      priority=body.priority, traceparent=caller.traceparent)
        requests = await self._builder.build(asked, prompts)
        _check_repeated(body, requests)
        echoes = await asyncio.to_thread(self._echoes, prompts, requests) if body.echo else [""] * len(prompts)
        return CompletionAsked(body, list(map(PromptRequest, requests, echoes)), stamp)

    def _echoes(self, prompts: Sequence[Prompt], requests: Sequence[GenerationRequest]) -> list[str]:
        return [prompt.text if isinstance(prompt, Text) else self._tokenizer.decode(
            request.prompt_token_ids, request.params.skip_special_tokens)
            for prompt, request in zip(prompts, requests, strict=True)]

    async def answer(self, asked: CompletionAsked) -> Completion:
        """Return the whole answer; choices are ordered by prompt. Raises ServingError."""
        collected = [CollectedChoice() for _ in range(len(asked.prompts) * asked.n)]
        usage = UsageCount(asked.requests)
        async with self._open(asked, usage) as deltas:
            async for prompt_index, delta in deltas:
                collected[prompt_index * asked.n + delta.choice].add(delta)
        write = partial(self._write, asked, collected, usage)
        return await asyncio.to_thread(write) if is_long(collected) else write()

    def _write(self, asked: CompletionAsked, collected: Sequence[CollectedChoice], usage: UsageCount) -> Completion:
        choices = []
        for index, choice in enumerate(collected):
            written = self._writer(asked, index).write(choice.to_delta(index % asked.n))
            choices += [written] if written is not None else []
        return _completion(asked, choices, usage)

    async def stream(self, asked: CompletionAsked) -> AsyncGenerator[bytes]:
        """Yield the chunks as JSON. Raises ServingError."""
        body, n = asked.body, asked.n
        writers: dict[int, _ChoiceWriter] = {}
        usage, counts = UsageCount(asked.requests), wants_continuous_usage(body.stream_options)
        template = ChunkTemplate(lambda index, text, token_ids: _completion(
            asked, [CompletionChoice(index=index, text=text, token_ids=token_ids)]), bool(body.return_token_ids))
        async with self._open(asked, usage) as deltas:
            async for prompt_index, delta in deltas:
                index = prompt_index * n + delta.choice
                if index not in writers:
                    writers[index] = self._writer(asked, index)
                if not counts and writers[index].is_plain(delta):
                    yield template.write(index, delta.text, delta.token_ids)
                elif (choice := writers[index].write(delta)) is not None:
                    yield to_bytes(_completion(asked, [choice], usage if counts else None))
        if wants_usage(body.stream_options):
            yield to_bytes(_completion(asked, [], usage))

    @asynccontextmanager
    async def _open(self, asked: CompletionAsked, usage: UsageCount
                    ) -> AsyncIterator[AsyncIterator[tuple[int, GenerationDelta]]]:
        async with open_stream(self._service, asked.requests) as deltas:
            yield _counted(deltas, usage, keeps_output=not _only_scores(asked.body))

    def _writer(self, asked: CompletionAsked, index: int) -> _ChoiceWriter:
        return _ChoiceWriter(asked.body, index, asked.prompts[index // asked.n], self._tokenizer)


class _ChoiceWriter:
    """Turns the deltas of one choice into the API's shape, the echoed prompt before the first."""

    def __init__(self, body: CompletionBody, index: int, asked: PromptRequest, tokenizer: Tokenizer) -> None:
        skips = asked.request.params.skip_special_tokens
        self._body, self._index, self._tokenizer = body, index, tokenizer
        self._prompt_token_ids = asked.request.prompt_token_ids
        self._echo = asked.echo
        self._starts = True
        self._shows_tokens = bool(body.return_token_ids)
        self._is_scored = body.logprobs is not None
        self._logprobs_of_prompt = CompletionLogprobsWriter(tokenizer, [], skips)
        self._logprobs = CompletionLogprobsWriter(tokenizer, self._prompt_token_ids, skips)
        self._logprobs.skip(self._echo)

    def is_plain(self, delta: GenerationDelta) -> bool:
        """Return whether there is to tell nothing but a text and tokens, which are not the first."""
        has_content = bool(delta.text or (self._shows_tokens and delta.token_ids))
        return has_content and delta.finish_reason is None and not (self._starts or self._is_scored)

    def write(self, delta: GenerationDelta) -> CompletionChoice | None:
        """Return None when there is nothing to tell, for the text is held back."""
        starts, self._starts = self._starts, False
        body = self._body
        shows_tokens = bool(delta.token_ids) and (body.return_token_ids or body.logprobs is not None)
        shows_prompt = starts and (body.echo or body.prompt_logprobs is not None)
        if not (delta.text or delta.finish_reason or shows_tokens or shows_prompt):
            self._starts = starts
            return None
        return CompletionChoice(
            index=self._index, text=self._echo + delta.text if starts else delta.text,
            logprobs=None if body.logprobs is None else self._scored(delta, starts),
            finish_reason=None if delta.finish_reason is None else delta.finish_reason.value,
            stop_reason=delta.stop_reason,
            prompt_logprobs=prompt_logprobs(self._tokenizer, delta.prompt_logprobs)
            if starts and body.prompt_logprobs is not None else None,
            token_ids=list(delta.token_ids) if body.return_token_ids else None,
            prompt_token_ids=list(self._prompt_token_ids) if starts and body.return_token_ids else None)

    def _scored(self, delta: GenerationDelta, starts: bool) -> CompletionLogprobs:
        output = self._logprobs.output(delta.logprobs)
        if not (starts and self._body.echo):
            return output
        prompt = self._logprobs_of_prompt.prompt(self._prompt_token_ids, delta.prompt_logprobs)
        return CompletionLogprobs(
            tokens=prompt.tokens + output.tokens, token_logprobs=prompt.token_logprobs + output.token_logprobs,
            top_logprobs=prompt.top_logprobs + output.top_logprobs,
            text_offset=prompt.text_offset + output.text_offset)


def _completion(asked: CompletionAsked, choices: list[CompletionChoice], usage: UsageCount | None = None) -> Completion:
    stamp = asked.stamp
    return Completion(id=stamp.id, created=stamp.created_s, model=asked.prompts[0].request.model,
                      system_fingerprint=stamp.fingerprint, choices=choices,
                      usage=None if usage is None else to_usage(usage))


async def _counted(deltas: AsyncIterator[tuple[int, GenerationDelta]], usage: UsageCount, keeps_output: bool
                   ) -> AsyncIterator[tuple[int, GenerationDelta]]:
    async for prompt_index, delta in deltas:
        if not keeps_output:
            reason = None if delta.finish_reason is None else FinishReason.LENGTH
            delta = delta._replace(text="", token_ids=(), logprobs=(), finish_reason=reason, stop_reason=None)
        usage.add(prompt_index, delta)
        yield prompt_index, delta


def _only_scores(body: CompletionBody) -> bool:
    return bool(body.echo) and body.max_tokens == 0


def _check_repeated(body: CompletionBody, requests: Sequence[GenerationRequest]) -> None:
    """Bound what of the prompts every choice of the answer repeats."""
    num_tokens = sum(request.params.n * len(request.prompt_token_ids) for request in requests)
    for field in ("echo", "return_token_ids"):
        if getattr(body, field) and num_tokens > MAX_REPEATED_TOKENS:
            raise InvalidRequestError(f"{field} would repeat {num_tokens} tokens of the prompts", param=field,
                                      fix=f"ask for at most {MAX_REPEATED_TOKENS}: fewer choices, or shorter prompts")


def _check(body: CompletionBody, num_prompts: int) -> None:
    if num_prompts > MAX_PROMPTS:
        raise InvalidRequestError(f"{num_prompts} prompts in one request", param="prompt",
                                  fix=f"send at most {MAX_PROMPTS}, the others in further requests")
    num_choices = num_prompts * (body.n or 1)
    if num_prompts > 1 and num_choices > MAX_CHOICES:
        raise InvalidRequestError(f"{num_prompts} prompts with n={body.n} make {num_choices} choices", param="n",
                                  fix=f"ask for at most {MAX_CHOICES} in one request")
