"""A replica's speed by its profile: more rows take longer, each of them less."""

from __future__ import annotations

import pytest

from cluster.autoscaler.speed import ReplicaSpeed, replica_speed
from tests.cluster.planner.planned_members import model_args
from tests.cluster.profiles import PROFILE


def test_the_curve_reaches_what_a_step_may_compute() -> None:
    speed = replica_speed(model_args(), 2, PROFILE, 512, 200)
    assert [rows for rows, _ in speed.step_s] == [1, 2, 4, 8, 16, 32, 64, 128, 200]
    seconds = [seconds for _, seconds in speed.step_s]
    assert seconds == sorted(seconds)
    assert speed.prefill_tokens_per_s == pytest.approx(200 / seconds[-1]) and 200 / seconds[-1] > 1 / seconds[0]


def test_the_rows_of_a_time_are_read_from_the_curve() -> None:
    speed = ReplicaSpeed(((1, 0.1), (11, 0.2)))
    assert speed.rows_within(0.05) == pytest.approx(0.5)
    assert speed.rows_within(0.15) == pytest.approx(6)
    assert speed.rows_within(9.0) == 11
    assert speed.seconds(speed.rows_within(0.13)) == pytest.approx(0.13)
