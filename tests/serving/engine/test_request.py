"""The status table of a request: it ends once, and nothing follows an end."""

from __future__ import annotations

import pytest

from model.step import SamplingSpec
from serving.engine.request import NEXT, IllegalTransition, Request, RequestStatus, Submission

ENDS = {RequestStatus.FINISHED, RequestStatus.CANCELLED, RequestStatus.FAILED}


def _request(status: RequestStatus = RequestStatus.WAITING) -> Request:
    return Request(Submission("a", (1, 2, 3), SamplingSpec(), max_tokens=4), "router", 0.0, status)


def test_every_status_has_a_row_and_can_end() -> None:
    assert set(NEXT) == set(RequestStatus)
    for status in set(RequestStatus) - ENDS:
        assert {RequestStatus.CANCELLED, RequestStatus.FAILED} <= NEXT[status]


@pytest.mark.parametrize("status", RequestStatus)
def test_only_the_moves_of_the_table_are_made(status: RequestStatus) -> None:
    for to in RequestStatus:
        request = _request(status)
        if to in NEXT[status]:
            request.advance(to, "test")
            assert request.status is to
        else:
            with pytest.raises(IllegalTransition, match=f"request a: {status} -> {to}.*allowed next"):
                request.advance(to, "test")
            assert request.status is status


@pytest.mark.parametrize("status", sorted(ENDS))
def test_nothing_follows_an_end(status: RequestStatus) -> None:
    with pytest.raises(IllegalTransition, match="none, it has ended"):
        _request(status).advance(RequestStatus.RUNNING, "test")


def test_tokens_are_those_of_prompt_and_output() -> None:
    request = _request()
    request.output_token_ids += [7, 8]
    assert request.num_tokens == 5 and request.request_id == "a"
