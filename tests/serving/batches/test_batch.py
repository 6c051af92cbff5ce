"""Which errors have a line tried again, and what a batch may become."""

from __future__ import annotations

import json

import pytest

from serving.batches.batch import (
    MAX_RETRY_S,
    MAX_TRIES,
    NEXT,
    OPEN,
    BatchStatus,
    LineOutcome,
    counts_as_try,
    retry_after_s,
    unanswered_line,
)
from serving.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
    QuotaExceededError,
    ServingError,
    ShardFailedError,
)


@pytest.mark.parametrize("error", [OverloadedError("full", retry_after_s=7.0),
                                   QuotaExceededError("used", retry_after_s=7.0), NotReadyError("starting")])
def test_who_is_not_let_in_is_tried_as_often_as_need_be(error: ServingError) -> None:
    wanted_s = 1.0 if isinstance(error, NotReadyError) else 7.0
    assert retry_after_s(error, 100) == wanted_s and not counts_as_try(error)


@pytest.mark.parametrize("error", [ShardFailedError("gone"), DeadlineExceededError("late")])
def test_what_fails_by_no_fault_of_its_own_is_tried_a_few_times(error: ServingError) -> None:
    waits = [retry_after_s(error, num) for num in range(MAX_TRIES)]
    assert waits[-1] is None and counts_as_try(error)
    assert all(wait is not None and wait <= MAX_RETRY_S for wait in waits[:-1])


@pytest.mark.parametrize("error", [InvalidRequestError("wrong"), ModelNotFoundError("none")])
def test_a_wrong_request_is_not_tried_again(error: ServingError) -> None:
    assert retry_after_s(error, 0) is None


def test_every_open_batch_can_come_to_an_end() -> None:
    ends = set(BatchStatus) - OPEN
    assert ends == {BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
    reached = {status for targets in NEXT.values() for status in targets}
    assert ends <= reached and reached | {BatchStatus.VALIDATING} == set(BatchStatus)


@pytest.mark.parametrize(("outcome", "code"), [
    (LineOutcome.EXPIRED, "batch_expired"), (LineOutcome.CANCELLED, "batch_cancelled")])
def test_a_line_that_was_not_answered_says_why(outcome: LineOutcome, code: str) -> None:
    written = json.loads(unanswered_line("batch_ab", 3, "é", outcome))
    assert written["id"] == "batch_req_ab_3" and written["custom_id"] == "é" and written["response"] is None
    assert written["error"]["code"] == code and written["error"]["message"]
