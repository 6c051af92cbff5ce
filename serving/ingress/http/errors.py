"""Errors as the clients of each API know them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.responses import Response

from serving.ingress.anthropic.answers import ErrorAnswer as AnthropicError
from serving.ingress.anthropic.answers import ErrorDetail as AnthropicDetail
from serving.ingress.openai.answers import ErrorAnswer, ErrorDetail
from serving.ingress.status import to_shared

ErrorWriter = Callable[[Exception, str], Response]      # of the error of the request with this id
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large",
               415: "unsupported_encoding"}
_ANTHROPIC_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 500: "api_error",
                    503: "overloaded_error", 504: "timeout_error"}


@dataclass(frozen=True, slots=True)
class _Told:
    http: int
    message: str
    openai_type: str
    param: str | None
    code: str | None
    headers: dict[str, str] = field(default_factory=dict)


def openai_error(error: Exception, request_id: str) -> Response:
    told = _told(error, request_id)
    detail = ErrorDetail(message=told.message, type=told.openai_type, param=told.param, code=told.code)
    return Response(ErrorAnswer(error=detail).model_dump_json(), told.http, told.headers,
                    media_type="application/json")


def anthropic_error(error: Exception, request_id: str) -> Response:
    told = _told(error, request_id)
    detail = AnthropicDetail(type=_ANTHROPIC_TYPES.get(told.http, "invalid_request_error"), message=told.message,
                             param=told.param, code=told.code)
    return Response(AnthropicError(error=detail, request_id=request_id).model_dump_json(), told.http,
                    told.headers | {"request-id": request_id}, media_type="application/json")


def _told(error: Exception, request_id: str) -> _Told:
    if isinstance(error, HTTPException):        # has no meaning behind the HTTP door: unknown paths, long bodies
        return _Told(error.status_code, error.detail, "invalid_request_error", None,
                     _HTTP_CODES.get(error.status_code), dict(error.headers or {}))
    shared = to_shared(error, request_id)
    headers = {} if shared.retry_after_s is None else {"retry-after": str(shared.retry_after_s)}
    if shared.status.http == 401:
        headers["www-authenticate"] = "Bearer"
    return _Told(shared.status.http, shared.message, shared.status.openai_type, shared.param,
                 shared.status.openai_code, headers)
