from __future__ import annotations

import numpy as np
import pytest

from cluster.planner.costs.rates_split import split_by_rates
from model.placement import ExpertRate, Placement

FAST, SLOW = ExpertRate(1.0, 1.0), ExpertRate(3.0, 3.0)
HOLDERS = ((0, 1), (0,), (0, 1))


def test_rows_go_by_the_rates_of_the_placement() -> None:
    num_rows_LE = np.array([[1000, 0, 0], [0, 7, 0]])
    alike, uneven = (split_by_rates(Placement(2, (HOLDERS, HOLDERS), rates), num_rows_LE)
                     for rates in ((FAST, FAST), (FAST, SLOW)))
    assert alike[0][0] == pytest.approx((0.5, 0.5), abs=0.02)
    assert uneven[0][0] == pytest.approx((0.75, 0.25), abs=0.02)
    assert alike[1] == uneven[1] == ((0.5, 0.5), (1.0,), (0.5, 0.5))
