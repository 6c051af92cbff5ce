"""The one table from errors to what a client sees of them, over HTTP and over gRPC.

Messages of our own errors are written for clients and go out as they are. Anything else is a fault of ours: the client
gets a request id to tell us, the log gets the rest.
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass

import grpc

from serving.errors import (
    ClientGoneError,
    ContextLengthError,
    DeadlineExceededError,
    ForbiddenError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    QuotaExceededError,
    ServingError,
    ShardFailedError,
    UnauthorizedError,
    UnsupportedFieldError,
)

logger = logging.getLogger(__name__)

NOT_READY_RETRY_S = 5       # an epoch takes seconds to start


@dataclass(frozen=True, slots=True)
class Status:
    http: int
    openai_type: str
    openai_code: str
    grpc: grpc.StatusCode


_REQUEST = "invalid_request_error"
INTERNAL = Status(500, "server_error", "internal_error", grpc.StatusCode.INTERNAL)
STATUS: dict[type[BaseException], Status] = {
    InvalidRequestError: Status(400, _REQUEST, "invalid_request", grpc.StatusCode.INVALID_ARGUMENT),
    UnsupportedFieldError: Status(400, _REQUEST, "unsupported_parameter", grpc.StatusCode.INVALID_ARGUMENT),
    ContextLengthError: Status(400, _REQUEST, "context_length_exceeded", grpc.StatusCode.INVALID_ARGUMENT),
    UnauthorizedError: Status(401, _REQUEST, "invalid_api_key", grpc.StatusCode.UNAUTHENTICATED),
    ForbiddenError: Status(403, _REQUEST, "insufficient_permissions", grpc.StatusCode.PERMISSION_DENIED),
    NotFoundError: Status(404, _REQUEST, "not_found", grpc.StatusCode.NOT_FOUND),
    ModelNotFoundError: Status(404, _REQUEST, "model_not_found", grpc.StatusCode.NOT_FOUND),
    OverloadedError: Status(429, "rate_limit_error", "rate_limit_exceeded", grpc.StatusCode.RESOURCE_EXHAUSTED),
    QuotaExceededError: Status(429, "insufficient_quota", "insufficient_quota", grpc.StatusCode.RESOURCE_EXHAUSTED),
    DeadlineExceededError: Status(504, "timeout_error", "deadline_exceeded", grpc.StatusCode.DEADLINE_EXCEEDED),
    TimeoutError: Status(504, "timeout_error", "deadline_exceeded", grpc.StatusCode.DEADLINE_EXCEEDED),
    ClientGoneError: Status(499, _REQUEST, "cancelled", grpc.StatusCode.CANCELLED),
    asyncio.CancelledError: Status(499, _REQUEST, "cancelled", grpc.StatusCode.CANCELLED),
    NotReadyError: Status(503, "service_unavailable_error", "not_ready", grpc.StatusCode.UNAVAILABLE),
    ShardFailedError: Status(503, "service_unavailable_error", "shard_failed", grpc.StatusCode.UNAVAILABLE),
    ServingError: INTERNAL,
}


@dataclass(frozen=True, slots=True)
class SharedError:
    """The parts of an error that may leave the process."""

    status: Status
    message: str
    param: str | None = None
    retry_after_s: int | None = None        # whole seconds, rounded up: the Retry-After header knows no fractions


def status_of(error: BaseException) -> Status:
    """Return the table's row for the error's class or the nearest class above it."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), INTERNAL)


def to_shared(error: BaseException, request_id: str) -> SharedError:
    """Return what the client is told. Unexpected errors are logged with the request id, and told without their
    content."""
    status = status_of(error)
    if status is INTERNAL:
        logger.error("request_failed request_id=%s error=%s", request_id, type(error).__name__, exc_info=error)
        return SharedError(status, f"internal error; report request id {request_id}")
    if not isinstance(error, ServingError):
        return SharedError(status, "the request was cancelled" if status.http == 499 else "the request took too long")
    return SharedError(status, str(error), error.param, _retry_after_s(error))


def _retry_after_s(error: ServingError) -> int | None:
    match error:
        case OverloadedError():
            return max(1, math.ceil(error.retry_after_s))
        case NotReadyError() | ShardFailedError():
            return NOT_READY_RETRY_S
        case _:
            return None
