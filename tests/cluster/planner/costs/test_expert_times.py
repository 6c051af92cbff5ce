"""The expected time of an expert, and who is chosen how often."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.planner.costs.device_curves import curve_seconds
from cluster.planner.costs.expert_times import chosen_probability, expert_times
from tests.cluster.planner.planned_members import curve


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
