"""Answers lines of batches as the doors answer requests: the same checks, the same way, the same errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import cast

from pydantic import BaseModel, JsonValue

from serving.batches.batch import BatchStatus, Line, TokenCounts, line_id
from serving.batches.line_store import LineAnswer
from serving.batches.validation import LineHead
from serving.errors import InvalidRequestError, UnsupportedFieldError
from serving.ingress.batches.batch_types import BatchLineBody, LineResponse, OutputLine
from serving.ingress.body_bounds import body_bounds
from serving.ingress.build_request import check
from serving.ingress.caller import Caller, Stamp
from serving.ingress.endpoint import A, Endpoint, G
from serving.ingress.json_reader import BodyBounds, read_json
from serving.ingress.openai.answers import ErrorAnswer, ErrorDetail, Usage
from serving.ingress.openai.bodies import ChatCompletionBody, CompletionBody, parse_body
from serving.ingress.openai.chat import ChatEndpoint
from serving.ingress.openai.completions import CompletionEndpoint
from serving.ingress.responses.answers import ResponseUsage
from serving.ingress.responses.bodies import parse_body as parse_response_body
from serving.ingress.responses.endpoint import ResponsesEndpoint
from serving.ingress.responses.store import ResponseStore
from serving.ingress.status import to_shared
from serving.option_types import ToolParserName
from serving.router.generation import Service
from serving.tenants.key_ring import KeyRing
from serving.text.tokenizer import Tokenizer

Way = Callable[[bytes, Caller, Stamp], Awaitable[BaseModel]]


class LineWorker:
    def __init__(self, service: Service, tokenizer: Tokenizer, tool_parser: ToolParserName | None,
                 responses: ResponseStore, keys: KeyRing | None) -> None:
        """Without `keys` everybody may ask."""
        self._keys = keys
        self._fingerprint = f"moesaic-{version('moesaic')}"
        self._bounds = body_bounds(max(card.max_model_len for card in service.cards))
        self._line_bounds = _of_lines(self._bounds)
        self._ways: dict[str, Way] = {
            "/v1/chat/completions": self._way(partial(parse_body, ChatCompletionBody), "chatcmpl-",
                                              ChatEndpoint(service, tokenizer, tool_parser)),
            "/v1/completions": self._way(partial(parse_body, CompletionBody), "cmpl-",
                                         CompletionEndpoint(service, tokenizer)),
            "/v1/responses": self._way(parse_response_body, "resp_",
                                       ResponsesEndpoint(service, tokenizer, tool_parser, responses))}

    def check(self, content: bytes, endpoint: str) -> LineHead:
        """Return what a line says beside its body. Raises InvalidRequestError."""
        line = self._read(content)
        if line.url != endpoint:
            raise InvalidRequestError(f"url is {line.url!r}, and the batch is for {endpoint}", param="url",
                                      fix="make them the same")
        model = line.body.get("model")
        return LineHead(line.custom_id, model[:256] if isinstance(model, str) and model.isprintable() else None)

    async def answer(self, line: Line, content: bytes) -> LineAnswer:
        """Have a line answered. Raises ServingError."""
        body = await asyncio.to_thread(self._body, content)
        key = self._keys.of_id(line.batch.key_id) if self._keys is not None and line.batch.key_id else None
        request_id = line_id(*line.place)
        created_s = int(line.batch.times_s[BatchStatus.IN_PROGRESS])
        answered = await self._ways[line.batch.endpoint](
            body, Caller(request_id, key), Stamp(request_id, created_s, self._fingerprint))
        return await asyncio.to_thread(_written, line, 200, answered)

    def refusal(self, line: Line, error: Exception) -> LineAnswer:
        """Return what is written of a line that an error has ended."""
        shared = to_shared(error, line_id(*line.place))
        detail = ErrorDetail(message=shared.message, type=shared.status.openai_type, param=shared.param,
                             code=shared.status.openai_code)
        return _written(line, shared.status.http, ErrorAnswer(error=detail))

    def _way(self, parse: Callable[[bytes, BodyBounds], G], id_prefix: str, endpoint: Endpoint[G, A]) -> Way:
        async def answer(content: bytes, caller: Caller, stamp: Stamp) -> BaseModel:
            body = await asyncio.to_thread(parse, content, self._bounds)
            if body.stream:
                raise UnsupportedFieldError("a batch has no streams", fix="leave stream out", param="stream")
            stamp = replace(stamp, id=f"{id_prefix}{stamp.id}")
            return await endpoint.answer(await endpoint.build(body, caller, stamp))
        return answer

    def _read(self, content: bytes) -> BatchLineBody:
        return check(BatchLineBody, read_json(content, self._line_bounds))

    def _body(self, content: bytes) -> bytes:
        """Return the request's body as a client would have sent it."""
        return json.dumps(self._read(content).body, ensure_ascii=False).encode()


def _of_lines(bounds: BodyBounds) -> BodyBounds:
    """Return the bounds of a line, of which a body is one field."""
    fields = {f"body.{name}": bound for name, bound in bounds.fields.items()}
    return replace(bounds, num_values=bounds.num_values + 8, depth=bounds.depth + 1, fields=fields,
                   free=tuple(f"body.{path}" for path in bounds.free))


def _written(line: Line, status: int, answered: BaseModel) -> LineAnswer:
    request_id = line_id(*line.place)
    written = OutputLine(id=request_id, custom_id=line.entry.custom_id, response=LineResponse(
        status_code=status, request_id=request_id, body=cast(JsonValue, answered.model_dump(mode="json"))))
    return LineAnswer(written.model_dump_json().encode() + b"\n", status != 200, _tokens(answered))


def _tokens(answered: BaseModel) -> TokenCounts:
    usage = getattr(answered, "usage", None)
    if isinstance(usage, Usage):
        reasoning = usage.completion_tokens_details
        return TokenCounts(usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens,
                           0 if reasoning is None else reasoning.reasoning_tokens)
    if isinstance(usage, ResponseUsage):
        return TokenCounts(usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens,
                           usage.output_tokens_details.reasoning_tokens)
    return TokenCounts()
