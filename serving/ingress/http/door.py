"""What every path of the HTTP door does beside its own work: it asks for the key, reads the body, answers errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from serving.errors import ClientGoneError
from serving.ingress.auth import key_of_headers
from serving.ingress.caller import Caller, Stamp, choose_request_id
from serving.ingress.endpoint import A, Endpoint, G
from serving.ingress.http.errors import ErrorWriter, openai_error
from serving.ingress.http.event_stream import EventStream
from serving.ingress.http.request import read_body, to_utf8, until_disconnect
from serving.ingress.json_reader import BodyBounds
from serving.tenants.key import Key, Scope
from serving.tenants.key_ring import KeyRing

_LONG_BODY_BYTES = 16 * 2**10       # from there a thread parses it
RateHeaders = Callable[[Key], dict[str, str]]
Handler = Callable[[Request, Caller], Awaitable[Response]]
B = TypeVar("B", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class AnswerStyle:
    """How an API's answers look on the wire."""

    id_prefix: str
    write_error: ErrorWriter
    has_names: bool = False     # of the events of a stream


class Door:
    def __init__(self, keys: KeyRing | None, bounds: BodyBounds, rates: RateHeaders) -> None:
        """Without `keys` everybody may ask. `rates` returns the headers of what is left of a key's rates."""
        self._keys = keys
        self._rates = rates
        self._bounds = bounds
        self.version = version("moesaic")

    def _guarded(self, handler: Handler, write_error: ErrorWriter, scope: Scope | None
                ) -> Callable[[Request], Awaitable[Response]]:
        """Put authentication before, and request id, rates and error objects after a handler. Without `scope` no key is
        asked for."""
        async def endpoint(request: Request) -> Response:
            request_id = choose_request_id(request.headers.get("x-request-id"))
            key: Key | None = None
            try:
                key = None if scope is None else self.check(request, scope)
                response = await handler(request, Caller(request_id, key, request.headers.get("traceparent", "")))
            except ClientDisconnect:
                response = write_error(ClientGoneError("the client went away"), request_id)
            except Exception as error:
                response = write_error(error, request_id)
            response.headers["x-request-id"] = request_id
            if key is not None and isinstance(response, EventStream):
                response.late_headers = partial(self._rates, key)
            elif key is not None:
                response.headers.update(self._rates(key))
            return response
        return endpoint

    def route(self, path: str, handler: Handler, method: str = "GET", write_error: ErrorWriter = openai_error,
              scope: Scope | None = Scope.INFER) -> Route:
        """Return the guarded route of one method of a path."""
        return Route(path, self._guarded(handler, write_error, scope), methods=[method])

    def check(self, request: Request, scope: Scope) -> Key | None:
        """Return the request's key; None when no keys are needed. Raises UnauthorizedError, ForbiddenError."""
        headers = request.headers
        return key_of_headers(headers.get("authorization"), headers.get("x-api-key"), self._keys, scope)

    async def read(self, request: Request, parse: Callable[[bytes, BodyBounds], B]) -> B:
        """Return the body. Raises HTTPException, and what `parse` raises."""
        content = await read_body(request)
        if len(content) < _LONG_BODY_BYTES:
            return parse(to_utf8(content), self._bounds)
        return await asyncio.to_thread(lambda: parse(to_utf8(content), self._bounds))

    async def generate(self, request: Request, body: G, caller: Caller, endpoint: Endpoint[G, A], style: AnswerStyle
                       ) -> Response:
        """Answer a body that was read. A client that goes away ends what was begun for it. Raises ServingError."""
        stamp = Stamp(f"{style.id_prefix}{caller.request_id}", int(time.time()), f"moesaic-{self.version}")
        if body.stream:
            asked = await until_disconnect(request.receive, endpoint.build(body, caller, stamp))
            return stream_response(endpoint.stream(asked), caller, style)

        async def answer() -> Response:
            return json_response(await endpoint.answer(await endpoint.build(body, caller, stamp)))
        return await until_disconnect(request.receive, answer())


def json_response(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def stream_response(payloads: AsyncGenerator[bytes], caller: Caller, style: AnswerStyle) -> EventStream:
    return EventStream(payloads, partial(_late_error, caller, style.write_error), style.has_names)


def _late_error(caller: Caller, write_error: ErrorWriter, error: Exception) -> Response:
    response = write_error(error, caller.request_id)
    response.headers["x-request-id"] = caller.request_id
    return response
