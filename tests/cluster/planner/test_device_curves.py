from __future__ import annotations

import numpy as np
import pytest

from cluster.planner.device_curves import seconds_at


def test_a_curve_is_read_between_beyond_and_below_its_points() -> None:
    curve = ((1, 2.0), (5, 4.0), (9, 12.0))
    rows_N = np.array([0.0, 0.25, 1.0, 3.0, 5.0, 9.0, 11.0])
    assert seconds_at(curve, rows_N).tolist() == pytest.approx([0.0, 0.5, 2.0, 3.0, 4.0, 12.0, 16.0])


def test_one_point_is_a_rate_and_a_falling_end_stays_level() -> None:
    assert seconds_at(((4, 8.0),), np.array([4.0, 6.0])).tolist() == [8.0, 12.0]
    assert seconds_at(((1, 3.0), (2, 2.0)), np.array([10.0])).tolist() == [2.0]
