"""Budgets are never exceeded, whatever comes in whatever order, and are what was used in the end."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.tenants.key import Limits
from serving.tenants.standing import Ask, Grant, Refusal, Spent, Standing, at, reserve, settle

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp()
ASKS = st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(0, 50)).map(
    lambda found: Ask(found[0], sum(found), sum(found[:2])))


def granted(standing: Standing, limits: Limits, ask: Ask, now_s: float = NOON) -> tuple[Standing, Grant]:
    found = reserve(at(standing, now_s), limits, ask, now_s)
    assert not isinstance(found, Refusal), found
    return found


def refused(standing: Standing, limits: Limits, ask: Ask, now_s: float = NOON) -> Refusal:
    found = reserve(at(standing, now_s), limits, ask, now_s)
    assert isinstance(found, Refusal)
    return found


@given(st.lists(st.tuples(ASKS, st.floats(0, 1), st.booleans()), max_size=40), st.integers(50, 300))
def test_a_budget_is_kept_and_ends_as_what_was_used(steps: list[tuple[Ask, float, bool]], budget: int) -> None:
    limits, standing, opened, num_used = Limits(tokens_per_day=budget, tokens_per_month=2 * budget), Standing(), [], 0
    for ask, part, ends_one in steps:
        found = reserve(at(standing, NOON), limits, ask, NOON)
        if not isinstance(found, Refusal):
            standing, grant = found
            assert ask.num_least <= grant.num_tokens <= ask.num_most
            opened.append((grant, int(part * grant.num_tokens)))
        if opened and ends_one:
            grant, used = opened.pop(0)
            standing, num_used = settle(standing, Spent(NOON, grant.num_tokens, grant.num_charged, used, True)), \
                num_used + used
        assert standing.day_tokens <= budget
    for grant, used in opened:
        standing = settle(standing, Spent(NOON, grant.num_tokens, grant.num_charged, used, True))
        num_used += used
    assert standing.day_tokens == standing.month_tokens == num_used and standing.num_open == 0
    assert standing.tokens.total == num_used


def test_who_sets_no_maximum_gets_what_is_left() -> None:
    limits = Limits(tokens_per_day=100)
    standing, grant = granted(Standing(), limits, Ask(10, 5000, 1034))
    assert grant.num_tokens == 100
    refusal = refused(standing, limits, Ask(1, 1, 1))
    assert (refusal.limit, refusal.used, refusal.retry_after_s) == ("tokens_per_day", 100, 12 * 3600)
    assert refused(Standing(), limits, Ask(101, 101, 101)).retry_after_s is None


def test_days_and_months_begin_anew_and_keep_what_was_of_the_old_ones() -> None:
    limits, december = Limits(tokens_per_day=100, tokens_per_month=100), NOON + 12 * 3600
    standing, grant = granted(Standing(), limits, Ask(60, 60, 60))
    assert refused(standing, limits, Ask(60, 60, 60)).retry_after_s == 12 * 3600
    later, _ = granted(standing, limits, Ask(60, 60, 60), december)
    assert (later.day_tokens, later.month_tokens) == (60, 60)
    ended = settle(later, Spent(NOON, grant.num_tokens, grant.num_charged, 20, True))
    assert (ended.day_tokens, ended.month_tokens, ended.num_open) == (60, 60, 1)


def test_rates_count_what_is_expected_and_then_what_was() -> None:
    limits = Limits(tokens_per_minute=1000, requests_per_minute=2)
    standing, grant = granted(Standing(), limits, Ask(10, 100_000, 1034))
    assert grant == Grant(100_000, 1000)
    refusal = refused(standing, limits, Ask(10, 10, 10))
    assert refusal.limit == "tokens_per_minute" and refusal.retry_after_s is not None
    standing = settle(standing, Spent(NOON, 100_000, 1000, 30, True))
    standing, _ = granted(standing, limits, Ask(10, 10, 10))
    assert standing.tokens.total == 40 and refused(standing, limits, Ask(10, 10, 10)).limit == "requests_per_minute"
    granted(standing, limits, Ask(10, 10, 10), NOON + 63)
    assert refused(standing, limits, Ask(1001, 1001, 1001), NOON + 63).retry_after_s is None


def test_requests_at_a_time() -> None:
    limits = Limits(concurrent_requests=1)
    standing, grant = granted(Standing(), limits, Ask(1, 1, 1))
    assert refused(standing, limits, Ask(1, 1, 1)).limit == "concurrent_requests"
    granted(settle(standing, Spent(NOON, grant.num_tokens, grant.num_charged, 1, True)), limits, Ask(1, 1, 1))


def test_an_ask_is_in_order() -> None:
    with pytest.raises(AssertionError):
        Ask(2, 1, 2)
