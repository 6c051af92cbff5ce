"""Bytes and latency of one layer's exchange."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planner.costs.exchange_cost import collective_bytes, exchange_seconds, least_exchange_seconds
from tests.cluster.planner.planned_members import profile

PROFILES = [profile(latency_s=1e-3, bytes_per_s=1e6), profile(latency_s=2e-3, bytes_per_s=1e5)]


def test_alone_nothing_is_exchanged() -> None:
    seconds = exchange_seconds(PROFILES, np.array([8.0, 0.0]), np.array([1.0]), np.array([[1.0, 0.0]]), 100)
    assert seconds.tolist() == [0.0, 0.0]


def test_each_row_goes_once_and_each_output_returns() -> None:
    """Member 0 has 8 rows, all of which need both experts of member 1."""
    seconds = exchange_seconds(PROFILES, np.array([8.0, 0.0]), np.array([1.0, 1.0]), np.array([[0.0, 1], [0, 1]]), 100)
    assert seconds == pytest.approx([2 * 2e-3 + 8 * 100 / 1e6, 2 * 2e-3 + 16 * 100 / 1e5])


def test_rows_that_stay_cost_nothing() -> None:
    rows_M, split_EM = np.array([4.0, 4.0]), np.array([[1.0, 0.0], [0.0, 1.0]])
    seconds = exchange_seconds(PROFILES, rows_M, np.array([0.5, 0.5]), split_EM, 100)
    assert seconds == pytest.approx([4e-3 + 4 * 100 / 1e6, 4e-3 + 4 * 100 / 1e5])


def test_a_link_that_was_not_measured_costs_nothing() -> None:
    without = [replace(one, link=None) for one in PROFILES]
    seconds = exchange_seconds(without, np.array([8.0, 8.0]), np.array([1.0]), np.array([[1.0, 0.0]]), 100)
    assert seconds.tolist() == [0.0, 0.0]


def test_a_member_that_takes_no_part_does_not_slow_the_others() -> None:
    three = [*PROFILES, profile(latency_s=1.0, bytes_per_s=1.0)]
    seconds = exchange_seconds(three, np.array([8.0, 0.0, 0.0]), np.array([1.0]), np.array([[0.0, 1.0, 0.0]]), 100)
    assert seconds[2] == 0.0 and seconds.max() < 0.1


@settings(max_examples=60)
@given(st.integers(2, 4), st.integers(1, 8), st.integers(0, 999), st.booleans())
def test_nothing_exchanges_in_less_than_the_least(num_members: int, num_slots: int, seed: int, is_whole: bool) -> None:
    """Random shares, and random copies in the slots."""
    random = np.random.default_rng(seed)
    members = [profile(latency_s=10 ** random.uniform(-5, -3), bytes_per_s=10 ** random.uniform(5, 7))
               for _ in range(num_members)]
    num_experts = num_slots * num_members
    probability_E = random.dirichlet(np.ones(num_experts))
    slots_M = [num_slots + random.integers(0, 2) for _ in range(num_members)]
    owner_E = random.permutation(np.repeat(np.arange(num_members), num_slots))
    rows_M = np.eye(num_members)[0] * 100 if is_whole else random.dirichlet(np.ones(num_members)) * 100
    split_EM = np.eye(num_members)[owner_E]
    least_s = least_exchange_seconds(members, 100, probability_E, slots_M, 100)
    assert least_s <= exchange_seconds(members, rows_M, probability_E, split_EM, 100).max() * (1 + 1e-9)


def test_the_least_is_reached_by_members_alike() -> None:
    """Whole rows of one member: 8 rows, half of the outputs from the other, which nearly every row needs."""
    alike = [profile(latency_s=1e-3, bytes_per_s=1e6)] * 2
    probability_E, split_EM = np.full(20, 0.5), np.repeat(np.eye(2), 10, axis=0)
    reached_s = exchange_seconds(alike, np.array([4.0, 4.0]), probability_E, split_EM, 100).max()
    assert least_exchange_seconds(alike, 8, probability_E, (10, 10), 100) == pytest.approx(reached_s, rel=0.02)


def test_one_member_that_can_hold_all_needs_no_exchange() -> None:
    assert least_exchange_seconds(PROFILES, 8, np.array([0.5, 0.5]), (2, 1), 100) == 0.0


def test_a_collective_is_worth_what_the_slowest_link_sends_meanwhile() -> None:
    slow = replace(PROFILES[1], layer_overhead_s=3e-3)
    assert collective_bytes([replace(PROFILES[0], layer_overhead_s=1e-3), slow]) == 500     # (2 + 3) ms at 1e5 bytes/s
    assert collective_bytes([PROFILES[0], replace(slow, link=None)]) is None
