"""The paths of no other API than vLLM's, /tokenize, /detokenize, /version, /health and /metrics, /usage and /docs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from serving.errors import InvalidRequestError, NotFoundError, NotReadyError, UnsupportedFieldError
from serving.ingress.build_request import RequestBuilder
from serving.ingress.caller import Caller
from serving.ingress.http.door import Door, json_response
from serving.ingress.http.openapi import describe, page
from serving.ingress.http.request import until_disconnect
from serving.ingress.openai.answers import Detokenized, Tokenized, Version
from serving.ingress.openai.bodies import DetokenizeBody, TokenizeBody, parse_body, to_conversation
from serving.ingress.prompts import Text
from serving.ingress.tools import ToolUse, check_tools
from serving.ingress.usage import UsageEndpoint
from serving.router.generation import Service
from serving.tenants.key import Scope
from serving.text.tokenizer import Tokenizer
from serving.token_ids import check_token_ids

_MANY_TOKENS = 4096                 # from there a thread writes an answer about them
RenderMetrics = Callable[[], tuple[bytes, str]]         # -> text and its content type
WhyNotReady = Callable[[], str]


class OwnPaths:
    def __init__(self, door: Door, service: Service, tokenizer: Tokenizer, render_metrics: RenderMetrics,
                 why_not_ready: WhyNotReady, usage: UsageEndpoint | None) -> None:
        """`usage` None: there are no keys that anything is counted for."""
        self._door = door
        self._service = service
        self._tokenizer = tokenizer
        self._builder = RequestBuilder(service, tokenizer)
        self._render_metrics = render_metrics
        self._why_not_ready = why_not_ready
        self._usage = usage
        self._description = describe(door.version)

    def routes(self) -> list[Route]:
        route = self._door.route
        return [
            route("/tokenize", self.tokenize, "POST"), route("/detokenize", self.detokenize, "POST"),
            route("/health", self.health, scope=None), route("/metrics", self.metrics, scope=Scope.STATUS),
            route("/usage", self.usage, scope=Scope.STATUS), route("/version", self.version, scope=None),
            route("/openapi.json", self.openapi, scope=None), route("/docs", self.docs, scope=None),
        ]

    async def tokenize(self, request: Request, caller: Caller) -> Response:
        body = await self._door.read(request, partial(parse_body, TokenizeBody))
        card = self._builder.card(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("give either prompt or messages", param="prompt")
        if body.messages is not None and body.add_special_tokens:
            raise UnsupportedFieldError("add_special_tokens is not for messages: a chat template writes its own",
                                        fix="leave it out", param="add_special_tokens")
        if body.messages is not None:
            prompt = to_conversation(body.messages, body.add_generation_prompt, body.chat_template_kwargs)
            prompt = replace(prompt, tools=ToolUse(check_tools(body.tools or ())).for_template())
            token_ids = await self._builder.count(prompt, card)
        else:
            text = Text(body.prompt or "", body.add_special_tokens is not False)
            token_ids = await self._builder.count(text, card)

        def write() -> Response:
            names = [self._tokenizer.token_name(token_id) for token_id in token_ids] if body.return_token_strs else None
            return json_response(Tokenized(count=len(token_ids), max_model_len=card.max_model_len,
                                           tokens=list(token_ids), token_strs=names))
        return await _in_turn(write, len(token_ids))

    async def detokenize(self, request: Request, caller: Caller) -> Response:
        body = await self._door.read(request, partial(parse_body, DetokenizeBody))
        self._builder.card(body.model)

        def write() -> Response:
            check_token_ids("tokens", body.tokens, self._tokenizer.num_embeddings)
            return json_response(Detokenized(prompt=self._tokenizer.decode(body.tokens, skip_special_tokens=False)))
        return await _in_turn(write, len(body.tokens))

    async def health(self, request: Request, caller: Caller) -> Response:
        if not self._service.is_ready():
            raise NotReadyError(self._why_not_ready(), fix="wait, or look at moesaic status")
        return Response()

    async def metrics(self, request: Request, caller: Caller) -> Response:
        text, content_type = self._render_metrics()
        return Response(text, headers={"content-type": content_type})

    async def usage(self, request: Request, caller: Caller) -> Response:
        if self._usage is None or caller.key is None:
            raise NotFoundError("this service counts nobody's usage: it asks for no keys",
                                fix="its operator sets access.keys in the config")
        report = self._usage.report(dict(request.query_params), caller.key)
        return json_response(await until_disconnect(request.receive, report))

    async def version(self, request: Request, caller: Caller) -> Response:
        return json_response(Version(version=self._door.version))

    async def openapi(self, request: Request, caller: Caller) -> Response:
        return JSONResponse(self._description)

    async def docs(self, request: Request, caller: Caller) -> Response:
        return HTMLResponse(page(self._description))


async def _in_turn(write: Callable[[], Response], num_tokens: int) -> Response:
    """Write an answer about many tokens in a thread, so that others have their turn meanwhile."""
    return await asyncio.to_thread(write) if num_tokens > _MANY_TOKENS else write()
