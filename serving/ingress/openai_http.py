"""The HTTP door: OpenAI's API, and vLLM's /tokenize, /detokenize, /version, /health and /metrics.

The app needs no lifespan events, so that Ray Serve can mount one made inside a replica.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from importlib.metadata import version
from typing import TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from serving.config import RouterConfig
from serving.errors import ClientGoneError, InvalidRequestError, NotReadyError, UnsupportedFieldError
from serving.ingress.auth import tenant_of_header
from serving.ingress.body_bounds import body_bounds
from serving.ingress.build_request import RequestBuilder
from serving.ingress.event_stream import EventStream
from serving.ingress.http_request import (
    Caller,
    PlainPaths,
    Stamp,
    choose_request_id,
    read_body,
    to_utf8,
    until_disconnect,
)
from serving.ingress.openai_chat import ChatEndpoint
from serving.ingress.openai_completions import CompletionEndpoint
from serving.ingress.openai_responses import (
    Detokenized,
    ErrorAnswer,
    ErrorDetail,
    ModelEntry,
    ModelList,
    Tokenized,
    Version,
)
from serving.ingress.openai_schema import (
    ChatCompletionBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parse_body,
    to_conversation,
)
from serving.ingress.prompts import Text
from serving.ingress.status import to_shared
from serving.router.generation import ModelCard, Service
from serving.router.request_checks import check_token_ids
from serving.text.tokenizer import Tokenizer

_LONG_BODY_BYTES = 16 * 2**10       # from there a thread parses it
_MANY_TOKENS = 4096                 # likewise to write an answer about them
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large",
               415: "unsupported_encoding"}
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/health", "/metrics",
          "/version")
RenderMetrics = Callable[[], tuple[bytes, str]]         # -> text and its content type
WhyNotReady = Callable[[], str]
Handler = Callable[[Request, Caller], Awaitable[Response]]
B = TypeVar("B", ChatCompletionBody, CompletionBody, TokenizeBody, DetokenizeBody)


def _shards_are_missing() -> str:
    return "no shards are serving yet"


def build_http_app(service: Service, tokenizer: Tokenizer, config: RouterConfig, render_metrics: RenderMetrics,
                   why_not_ready: WhyNotReady = _shards_are_missing, route_prefix: str = "/") -> Starlette:
    """Return the ASGI app of one router replica. `why_not_ready` is what /health says while it answers 503."""
    door = _HttpDoor(service, tokenizer, config, render_metrics, why_not_ready)
    closed, is_open = door.with_key, door.without_key
    routes = [
        Route("/v1/chat/completions", closed(door.chat_completions), methods=["POST"]),
        Route("/v1/completions", closed(door.completions), methods=["POST"]),
        Route("/v1/models", closed(door.models)),
        Route("/v1/models/{name:path}", closed(door.model)),
        Route("/tokenize", closed(door.tokenize), methods=["POST"]),
        Route("/detokenize", closed(door.detokenize), methods=["POST"]),
        Route("/health", is_open(door.health)),
        Route("/metrics", is_open(door.metrics)),
        Route("/version", is_open(door.version)),
    ]
    middleware = [Middleware(PlainPaths, prefix=route_prefix)]
    if config.cors_origins:
        middleware.insert(0, Middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"]))
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _answer_routing_error})
    app.router.redirect_slashes = False
    return app


class _HttpDoor:
    def __init__(self, service: Service, tokenizer: Tokenizer, config: RouterConfig,
                 render_metrics: RenderMetrics, why_not_ready: WhyNotReady) -> None:
        self._service = service
        self._why_not_ready = why_not_ready
        self._tokenizer = tokenizer
        self._api_keys = config.api_keys
        self._render_metrics = render_metrics
        self._bounds = body_bounds(max(card.max_model_len for card in service.cards))
        self._builder = RequestBuilder(service, tokenizer)
        self._chat = ChatEndpoint(service, tokenizer)
        self._completions = CompletionEndpoint(service, tokenizer)
        self._version = version("moesaic")

    def with_key(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        return self._guarded(handler, self._api_keys)

    def without_key(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        return self._guarded(handler, ())

    def _guarded(self, handler: Handler, api_keys: tuple[str, ...]) -> Callable[[Request], Awaitable[Response]]:
        """Put authentication before, and request id and error objects after a handler."""
        async def endpoint(request: Request) -> Response:
            request_id = choose_request_id(request.headers.get("x-request-id"))
            try:
                key_tenant = tenant_of_header(request.headers.get("authorization"), api_keys)
                response = await handler(request, Caller(request_id, key_tenant))
            except HTTPException as error:
                response = _http_error(error)
            except ClientDisconnect:
                response = _error(ClientGoneError("the client went away"), request_id)
            except Exception as error:
                response = _error(error, request_id)
            response.headers["x-request-id"] = request_id
            return response
        return endpoint

    async def chat_completions(self, request: Request, caller: Caller) -> Response:
        body = await self._parse(request, ChatCompletionBody)
        caller = caller.under(body.request_id)
        stamp = self._stamp("chatcmpl", caller)
        if body.stream:
            asked = await until_disconnect(request.receive, self._chat.build(body, caller))
            return _stream(self._chat.stream(body, asked, stamp), caller)

        async def answer() -> Response:
            return _json(await self._chat.answer(body, await self._chat.build(body, caller), stamp))
        return await until_disconnect(request.receive, answer())

    async def completions(self, request: Request, caller: Caller) -> Response:
        body = await self._parse(request, CompletionBody)
        caller = caller.under(body.request_id)
        stamp = self._stamp("cmpl", caller)
        if body.stream:
            asked = await until_disconnect(request.receive, self._completions.build(body, caller))
            return _stream(self._completions.stream(body, asked, stamp), caller)

        async def answer() -> Response:
            return _json(await self._completions.answer(body, await self._completions.build(body, caller), stamp))
        return await until_disconnect(request.receive, answer())

    async def models(self, request: Request, caller: Caller) -> Response:
        return _json(ModelList(data=[_entry(card) for card in self._service.cards]))

    async def model(self, request: Request, caller: Caller) -> Response:
        return _json(_entry(self._builder.card(request.path_params["name"])))

    async def tokenize(self, request: Request, caller: Caller) -> Response:
        body = await self._parse(request, TokenizeBody)
        card = self._builder.card(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("give either prompt or messages", param="prompt")
        if body.messages is not None and body.add_special_tokens:
            raise UnsupportedFieldError("add_special_tokens is not for messages: a chat template writes its own",
                                        fix="leave it out", param="add_special_tokens")
        if body.messages is not None:
            prompt = to_conversation(body.messages, body.add_generation_prompt, body.chat_template_kwargs)
            token_ids = await self._builder.count(prompt, card)
        else:
            text = Text(body.prompt or "", body.add_special_tokens is not False)
            token_ids = await self._builder.count(text, card)

        def write() -> Response:
            names = [self._tokenizer.token_name(token_id) for token_id in token_ids] if body.return_token_strs else None
            return _json(Tokenized(count=len(token_ids), max_model_len=card.max_model_len, tokens=list(token_ids),
                                   token_strs=names))
        return await _in_turn(write, len(token_ids))

    async def detokenize(self, request: Request, caller: Caller) -> Response:
        body = await self._parse(request, DetokenizeBody)
        self._builder.card(body.model)

        def write() -> Response:
            check_token_ids("tokens", body.tokens, self._tokenizer.num_embeddings)
            return _json(Detokenized(prompt=self._tokenizer.decode(body.tokens, skip_special_tokens=False)))
        return await _in_turn(write, len(body.tokens))

    async def health(self, request: Request, caller: Caller) -> Response:
        if not self._service.is_ready():
            raise NotReadyError(self._why_not_ready(), fix="wait, or look at moesaic status")
        return Response()

    async def metrics(self, request: Request, caller: Caller) -> Response:
        text, content_type = self._render_metrics()
        return Response(text, headers={"content-type": content_type})

    async def version(self, request: Request, caller: Caller) -> Response:
        return _json(Version(version=self._version))

    async def _parse(self, request: Request, kind: type[B]) -> B:
        content = await read_body(request)
        if len(content) < _LONG_BODY_BYTES:
            return parse_body(kind, to_utf8(content), self._bounds)
        return await asyncio.to_thread(lambda: parse_body(kind, to_utf8(content), self._bounds))

    def _stamp(self, prefix: str, caller: Caller) -> Stamp:
        return Stamp(f"{prefix}-{caller.request_id}", int(time.time()), f"moesaic-{self._version}")


async def _in_turn(write: Callable[[], Response], num_tokens: int) -> Response:
    """Write an answer about many tokens in a thread, so that others have their turn meanwhile."""
    return await asyncio.to_thread(write) if num_tokens > _MANY_TOKENS else write()


def _entry(card: ModelCard) -> ModelEntry:
    return ModelEntry(id=card.name, created=card.created_s, root=card.name, max_model_len=card.max_model_len)


def _json(answer: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(answer.model_dump_json(), status, headers, media_type="application/json")


def _stream(payloads: AsyncGenerator[bytes], caller: Caller) -> Response:
    def answer_error(error: Exception) -> Response:
        response = _error(error, caller.request_id)
        response.headers["x-request-id"] = caller.request_id
        return response
    return EventStream(payloads, answer_error)


async def _answer_routing_error(request: Request, error: Exception) -> Response:
    """Say what there is: the exceptions of Starlette's routes have a status and no more."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        detail = f"there is nothing at {request.url.path}. Ask one of {', '.join(_PATHS)}"
    else:
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))     # Starlette's is a set
        detail = f"{request.method} is not for {request.url.path}. Use {allowed}"
    response = _http_error(HTTPException(error.status_code, detail, error.headers))
    response.headers["x-request-id"] = choose_request_id(request.headers.get("x-request-id"))
    return response


def _error(error: Exception, request_id: str) -> Response:
    shared = to_shared(error, request_id)
    headers = {} if shared.retry_after_s is None else {"retry-after": str(shared.retry_after_s)}
    if shared.status.http == 401:
        headers["www-authenticate"] = "Bearer"
    detail = ErrorDetail(message=shared.message, type=shared.status.openai_type, param=shared.param,
                         code=shared.status.openai_code)
    return _json(ErrorAnswer(error=detail), shared.status.http, headers)


def _http_error(error: HTTPException) -> Response:
    """Answer what has no meaning behind the HTTP door: unknown paths and methods, bodies that are too large."""
    detail = ErrorDetail(message=error.detail, type="invalid_request_error", param=None,
                         code=_HTTP_CODES.get(error.status_code))
    return _json(ErrorAnswer(error=detail), error.status_code, dict(error.headers or {}))
