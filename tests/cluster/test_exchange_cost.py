"""Bytes and latency of one layer's exchange."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.exchange_cost import exchange_seconds
from tests.cluster.planned_members import profile

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
