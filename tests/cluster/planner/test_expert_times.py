"""Curves between their points, their two regimes, and the expected time of an expert."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.planner.device_curves import curve_seconds
from cluster.planner.expert_times import (
    check_profile,
    chosen_probability,
    expert_rate,
    expert_times,
    fit_rate,
)
from cluster.planner.layer.error import PlacementError
from serving.link.epoch import DeviceProfile, Link
from tests.cluster.planner.planned_members import curve, profile

CURVE = ((1, 10.0), (4, 10.0), (8, 20.0))


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


def test_few_rows_cost_the_chance_to_be_hit() -> None:
    seconds = expert_times(curve(40e-6, 5e-6), num_rows=4).expected(np.array([0.0, 0.25, 1.0]))
    assert seconds == pytest.approx([0.0, (1 - 0.75**4) * 40e-6, 40e-6], rel=1e-3)


def test_many_rows_cost_in_proportion() -> None:
    seconds = expert_times(curve(40e-6, 5e-6), num_rows=4000).expected(np.array([0.1, 0.2]))
    assert seconds == pytest.approx([400 * 5e-6, 800 * 5e-6], rel=1e-3)


def test_between_them_the_expectation_is_that_of_drawn_steps() -> None:
    drawn = np.random.default_rng(0).binomial(100, 0.08, size=20_000)
    mean = np.mean([curve_seconds(curve(40e-6, 5e-6), rows) for rows in drawn])
    assert expert_times(curve(40e-6, 5e-6), 100).expected(np.array([0.08]))[0] == pytest.approx(mean, rel=0.01)


def test_very_many_rows_take_their_mean() -> None:
    seconds = expert_times(curve(40e-6, 5e-6), num_rows=100_000).expected(np.array([0.5]))
    assert seconds == pytest.approx([50_000 * 5e-6])


def test_chances_follow_the_loads_and_are_at_most_one() -> None:
    assert chosen_probability((1, 1, 1, 1), 2).tolist() == [0.5] * 4
    assert chosen_probability((3, 1, 0, 0), 1).tolist() == [0.75, 0.25, 0, 0]
    assert chosen_probability((98, 1, 1), 2) == pytest.approx([1, 0.5, 0.5])
    assert chosen_probability((0, 0), 1).tolist() == [0.5, 0.5]
    assert chosen_probability((5, 0, 0), 2).tolist() == [1, 0, 0]


@pytest.mark.parametrize(("wrong", "says"), [
    (replace(profile(), expert_s=()), "member a: expert_s is empty"),
    (replace(profile(), dense_s=((1, 1.0), (1, 2.0))), r"dense_s is for rows \[1, 1\]"),
    (replace(profile(), head_s=((4, 1.0), (2, 2.0))), r"head_s is for rows \[4, 2\]"),
    (replace(profile(), head_s=((1, float("nan")),)), "head_s of 1 rows is nan"),
    (replace(profile(), expert_s=((1, 0.0),)), "expert_s of 1 rows is 0.0"),
    (replace(profile(), read_bytes_per_s=0.0), "read_bytes_per_s is 0.0; a speed is finite and above zero"),
    (replace(profile(), gemm_flop_per_s=((1, float("inf")),)), "gemm_flop_per_s is inf"),
    (replace(profile(), attention_s=-1.0), "attention_s is -1.0"),
    (replace(profile(), link=Link(1e-5, 0.0)), "link.bytes_per_s is 0.0"),
    (replace(profile(), link=Link(float("nan"), 1.0)), "link.latency_s is nan"),
    (replace(profile(), emulated_speed=0.0), "emulated_speed is 0.0"),
])
def test_a_wrong_profile_names_member_and_value(wrong: DeviceProfile, says: str) -> None:
    with pytest.raises(PlacementError, match=says):
        check_profile("a", wrong)


def test_a_right_profile_passes() -> None:
    check_profile("a", profile())
    check_profile("a", replace(profile(), link=None))
