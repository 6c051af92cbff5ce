"""Errors that a client can see.

ServingError
├── InvalidRequestError      the request itself is wrong: say which field, its value, and what is allowed
│   ├── UnsupportedFieldError    a field of the OpenAI API that is not implemented; never dropped silently
│   └── ContextLengthError       prompt + max_tokens cannot fit into the context or the KV cache
├── UnauthorizedError        no API key, or a wrong one
├── ForbiddenError           the API key is right, and not for this
├── NotFoundError            the request names what is not here
│   └── ModelNotFoundError       a model that is not served here
├── OverloadedError          admission is full, or a key's rate: come back after retry_after_s
│   └── QuotaExceededError       the tokens of the key's day or month are used up
├── DeadlineExceededError    the request's own deadline passed
├── ClientGoneError          the client went away
├── NotReadyError            no epoch yet: shards are starting
└── ShardFailedError         the shard failed and the request could not be continued elsewhere
"""

from __future__ import annotations


class ServingError(Exception):
    """Base of all errors of `serving/`. `fix` says what to do, `param` names the request's field (OpenAI's word)."""

    def __init__(self, message: str, *, fix: str = "", param: str | None = None) -> None:
        super().__init__(f"{message}. {fix}" if fix else message)
        self.message = message
        self.fix = fix
        self.param = param


class InvalidRequestError(ServingError):
    pass


class UnsupportedFieldError(InvalidRequestError):
    pass


class ContextLengthError(InvalidRequestError):
    pass


class UnauthorizedError(ServingError):
    pass


class ForbiddenError(ServingError):
    pass


class NotFoundError(ServingError):
    pass


class ModelNotFoundError(NotFoundError):
    pass


class OverloadedError(ServingError):
    def __init__(self, message: str, *, retry_after_s: float, fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.retry_after_s = retry_after_s


class QuotaExceededError(OverloadedError):
    pass


class DeadlineExceededError(ServingError):
    pass


class ClientGoneError(ServingError):
    pass


class NotReadyError(ServingError):
    pass


class ShardFailedError(ServingError):
    pass
