"""Every error has its row, and none tells what is inside."""

from __future__ import annotations

import asyncio
import inspect
import logging

import grpc
import pytest

from serving import errors
from serving.config import ConfigError
from serving.ingress.status import INTERNAL, STATUS, status_of, to_shared

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ServingError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_class_has_a_row_of_its_own(kind: type[errors.ServingError]) -> None:
    assert kind in STATUS, f"{kind.__name__} is missing in serving/ingress/status.py"


def test_rows_agree_between_the_doors() -> None:
    """A client must retry, or not, whichever door it used."""
    retryable = {grpc.StatusCode.UNAVAILABLE: 503, grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
                 grpc.StatusCode.INVALID_ARGUMENT: 400, grpc.StatusCode.DEADLINE_EXCEEDED: 504,
                 grpc.StatusCode.UNAUTHENTICATED: 401, grpc.StatusCode.NOT_FOUND: 404, grpc.StatusCode.CANCELLED: 499,
                 grpc.StatusCode.PERMISSION_DENIED: 403, grpc.StatusCode.INTERNAL: 500}
    assert all(retryable[status.grpc] == status.http for status in STATUS.values())


def test_unexpected_errors_are_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        shared = to_shared(KeyError("/secret/path"), "req-1")
    assert shared.status is INTERNAL and "secret" not in shared.message and "req-1" in shared.message
    assert "req-1" in caplog.text and "/secret/path" in caplog.text


def test_our_internal_errors_are_not_told_either(caplog: pytest.LogCaptureFixture) -> None:
    assert "password" not in to_shared(ConfigError("password=1"), "req-2").message
    assert "req-2" in caplog.text


def test_timeouts_and_cancellations_are_known() -> None:
    assert status_of(TimeoutError()).http == 504
    assert status_of(asyncio.CancelledError()).grpc is grpc.StatusCode.CANCELLED


def test_retry_after_is_rounded_up_to_whole_seconds() -> None:
    assert to_shared(errors.OverloadedError("full", retry_after_s=1.2), "r").retry_after_s == 2
    assert to_shared(errors.OverloadedError("full", retry_after_s=0.0), "r").retry_after_s == 1
    assert to_shared(errors.NotReadyError("starting"), "r").retry_after_s is not None
    assert to_shared(errors.InvalidRequestError("wrong", fix="do", param="n"), "r").retry_after_s is None
