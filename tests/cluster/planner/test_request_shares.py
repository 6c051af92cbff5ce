"""Shares of the requests: fair to speed, within the KV memory, and no others are faster."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planner.request_shares import request_shares, share_rows
from tests.cluster.planner.planned_members import step_costs


def test_rows_follow_speed() -> None:
    rows_M, seconds = share_rows(step_costs(4.0, 2.0, 1.0, 1.0, num_rows=2048), (True,) * 4)
    assert rows_M == pytest.approx([1024, 512, 256, 256], rel=0.01)
    assert rows_M.sum() == pytest.approx(2048)
    assert seconds == pytest.approx(step_costs(4.0, num_rows=2048).own_rows_s(0, rows_M[0]), rel=1e-3)


def test_who_takes_no_requests_gets_none() -> None:
    rows_M, _ = share_rows(step_costs(1.0, 1.0, 1.0), (True, False, True))
    assert rows_M.tolist() == pytest.approx([32, 0, 32])


def test_a_row_is_not_given_to_a_member_that_would_keep_the_others_waiting() -> None:
    rows_M, _ = share_rows(step_costs(1.0, 0.01), (True, True))
    assert rows_M.tolist() == pytest.approx([64, 0])


def test_kv_memory_caps_the_rows() -> None:
    rows_M, _ = share_rows(step_costs(4.0, 1.0, num_rows=64), (True, True), (16.0, 1000.0))
    assert rows_M.tolist() == pytest.approx([16, 48])


def test_too_little_kv_memory_counts_in_proportion() -> None:
    rows_M, _ = share_rows(step_costs(1.0, 1.0, num_rows=64), (True, True), (3.0, 1.0))
    assert rows_M.tolist() == pytest.approx([48, 16])


def test_without_any_kv_memory_speed_alone_counts() -> None:
    rows_M, _ = share_rows(step_costs(1.0, 1.0, num_rows=64), (True, True), (0.0, 0.0))
    assert rows_M.tolist() == pytest.approx([32, 32])


@settings(max_examples=40)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(1, 300), st.integers(0, 9))
def test_no_shares_are_faster(speeds: list[float], num_rows: int, seed: int) -> None:
    costs = step_costs(*speeds, num_rows=num_rows)
    rows_M, bound_s = share_rows(costs, (True,) * len(speeds))
    assert rows_M.sum() == pytest.approx(num_rows) and rows_M.min() >= 0
    reached_s = max(costs.own_rows_s(rank, rows) for rank, rows in enumerate(rows_M))
    assert bound_s == pytest.approx(reached_s, rel=1e-6) or reached_s >= bound_s
    others = np.random.default_rng(seed).dirichlet(np.ones(len(speeds)), size=20) * num_rows
    for other in others:
        assert max(costs.own_rows_s(rank, rows) for rank, rows in enumerate(other)) >= bound_s * (1 - 1e-9)


def test_the_largest_share_has_the_whole_token_budget() -> None:
    shares = request_shares([60.0, 30.0, 0.01, 0.0], 1024)
    assert [share.token_budget for share in shares] == [1024, 512, 16, 0]
    assert sum(share.fraction for share in shares) == pytest.approx(1)


def test_a_small_step_keeps_its_small_budget() -> None:
    assert [share.token_budget for share in request_shares([1.0, 0.1], 8)] == [8, 8]
