"""Priorities have a range, and waiting makes up for a level."""

from __future__ import annotations

import pytest

from serving.errors import InvalidRequestError
from serving.priority import AGEING_S, MAX_PRIORITY, MIN_PRIORITY, aged_arrival_s, check_priority


def test_what_is_out_of_range_is_named() -> None:
    assert [check_priority(priority) for priority in (MIN_PRIORITY, 0, MAX_PRIORITY)] == [-100, 0, 100]
    for priority in (MIN_PRIORITY - 1, MAX_PRIORITY + 1):
        with pytest.raises(InvalidRequestError, match=f"priority={priority}.*-100.*100") as refused:
            check_priority(priority)
        assert refused.value.param == "priority"


def test_a_level_is_worth_some_seconds_of_waiting() -> None:
    assert aged_arrival_s(50.0, 0) == 50.0
    assert aged_arrival_s(50.0, 2) == aged_arrival_s(50.0 + 2 * AGEING_S, 0)
    assert aged_arrival_s(50.0, -1) < aged_arrival_s(50.0, 0) < aged_arrival_s(50.0, 1)
