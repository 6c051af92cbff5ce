"""Errors of hubs: each reason says what to do, and none says a secret."""

from __future__ import annotations

import errno

import pytest

from cluster.device.hub import (
    HubError,
    HubVariables,
    Reason,
    causes,
    checkpoint_error,
    reason_of_disk_error,
    reason_of_status,
    redacted,
)

_VARIABLES = HubVariables("https://hub", "THE_TOKEN", "THE_ENDPOINT", "THE_CACHE")


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_says_what_to_do(reason: Reason) -> None:
    error = checkpoint_error("hf://a/b", HubError(reason, "its words"), _VARIABLES)
    assert str(error).startswith("model.path=hf://a/b: ") and "(its words)" in str(error)
    assert error.fix and "{" not in str(error)


@pytest.mark.parametrize(("text", "clean"), [
    ("Bearer secret is wrong", "Bearer *** is wrong"),
    ("at https://me:pass@host/x and ftp://u@h", "at https://***@host/x and ftp://***@h"),
    ("for 'https://cdn/a?X-Sig=abc&b=1' it", "for 'https://cdn/a?***' it"),
    ("one\n\n  two", "one two")])
def test_secrets_are_left_out(text: str, clean: str) -> None:
    assert redacted(text, ["secret", None, ""]) == clean


def test_reasons_of_statuses_and_of_the_disk() -> None:
    found = [reason_of_status(status) for status in (401, 403, 404, 408, 418, 429, 500, 599)]
    assert found == [Reason.SIGN_IN, Reason.FORBIDDEN, Reason.NO_REPOSITORY, Reason.SERVER, Reason.OTHER,
                     Reason.RATE_LIMIT, Reason.SERVER, Reason.SERVER]
    assert reason_of_disk_error(OSError(errno.ENOSPC, "full")) is Reason.DISK_FULL
    assert reason_of_disk_error(PermissionError(errno.EACCES, "no")) is Reason.NO_WRITING
    assert reason_of_disk_error(ValueError()) is None and reason_of_disk_error(ConnectionError()) is None


def test_causes_end_also_when_they_are_a_circle() -> None:
    first, second = ValueError(1), ValueError(2)
    first.__cause__, second.__context__ = second, first
    assert list(causes(first)) == [first, second]
