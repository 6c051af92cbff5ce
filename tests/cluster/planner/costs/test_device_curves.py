"""Curves between their points and beyond, and their two regimes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.planner.costs.device_curves import curve_seconds, expert_rate, fit_rate, seconds_at
from tests.cluster.planner.planned_members import curve, profile

CURVE = ((1, 10.0), (4, 10.0), (8, 20.0))


def test_a_curve_is_read_between_beyond_and_below_its_points() -> None:
    curve = ((1, 2.0), (5, 4.0), (9, 12.0))
    rows_N = np.array([0.0, 0.25, 1.0, 3.0, 5.0, 9.0, 11.0])
    assert seconds_at(curve, rows_N).tolist() == pytest.approx([0.0, 0.5, 2.0, 3.0, 4.0, 12.0, 16.0])


def test_one_point_is_a_rate_and_a_falling_end_stays_level() -> None:
    assert seconds_at(((4, 8.0),), np.array([4.0, 6.0])).tolist() == [8.0, 12.0]
    assert seconds_at(((1, 3.0), (2, 2.0)), np.array([10.0])).tolist() == [2.0]


@pytest.mark.parametrize(("rows", "seconds"), [(0, 0), (0.5, 5), (1, 10), (3, 10), (6, 15), (8, 20), (12, 30)])
def test_a_curve_is_read_by_straight_lines(rows: float, seconds: float) -> None:
    assert curve_seconds(CURVE, rows) == pytest.approx(seconds)


def test_a_curve_of_one_point_goes_on_in_proportion() -> None:
    assert curve_seconds(((2, 1.0),), 6) == pytest.approx(3.0)


def test_a_curve_that_falls_at_its_end_does_not_fall_on() -> None:
    assert curve_seconds(((1, 2.0), (2, 1.0)), 100) == 1.0


def test_the_rate_finds_both_regimes() -> None:
    rate = fit_rate(curve(read_s=40e-6, row_s=5e-6))
    assert rate.read_s == pytest.approx(40e-6) and rate.row_s == pytest.approx(5e-6) and rate.start_s == 0


def test_the_rate_finds_what_reading_adds_to_many_rows() -> None:
    rate = fit_rate(tuple((rows, max(1.0, 0.5 + 0.125 * rows)) for rows in (1, 4, 16, 64, 256)))
    assert (rate.read_s, rate.row_s, rate.start_s) == pytest.approx((1.0, 0.125, 0.5))


def test_the_rate_of_a_curve_that_only_reads_is_above_zero() -> None:
    rate = fit_rate(((1, 1.0), (2, 1.0)))
    assert rate.read_s == pytest.approx(1.0) and rate.row_s == pytest.approx(0.5)


def test_the_rate_of_noisy_times_is_near() -> None:
    noisy = tuple((rows, seconds * (1.03 if index % 2 else 0.97))
                  for index, (rows, seconds) in enumerate(profile().expert_s))
    rate = expert_rate(replace(profile(), expert_s=noisy))
    assert rate.read_s == pytest.approx(40e-6, rel=0.05) and rate.row_s == pytest.approx(5e-6, rel=0.05)
