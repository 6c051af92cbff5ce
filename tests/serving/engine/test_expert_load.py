from __future__ import annotations

import numpy as np
import pytest

from model.placement import Placement
from serving.engine.expert_load import ExpertLoadCounter

HALF_LIFE_S = 10.0
BEFORE = Placement(2, (((0,), (0, 1), (1,)), ((1,), (0,), (1,))))
AFTER = Placement(2, (((1,), (0,), (0,)), ((0,), (0,), (1,))))


def counter() -> ExpertLoadCounter:
    counts = ExpertLoadCounter(2, 3, HALF_LIFE_S, now_s=100.0)
    counts.use(BEFORE, 0)
    return counts


def test_rows_are_counted_by_logical_expert() -> None:
    counts = counter()
    counts.add(((3, 4), (5,)), 100.0)
    counts.add(((1, 0), (2,)), 100.0)
    load = counts.snapshot(100.0)
    assert (load.num_layers, load.num_experts, load.num_rows, counts.num_steps) == (2, 3, 15.0, 2)
    assert load.rows().tolist() == [[4, 4, 0], [0, 7, 0]]


def test_a_row_counts_half_after_the_half_life() -> None:
    counts = counter()
    counts.add(((8, 0), (0,)), 100.0)
    counts.add(((8, 0), (1,)), 100.0 + HALF_LIFE_S)
    assert counts.snapshot(100.0 + HALF_LIFE_S).rows().tolist() == [[12, 0, 0], [0, 1, 0]]
    assert counts.snapshot(100.0 + 3 * HALF_LIFE_S).rows().tolist() == [[3, 0, 0], [0, 0.25, 0]]


def test_after_a_switch_slots_are_other_experts() -> None:
    counts = counter()
    counts.add(((1, 2), (3,)), 100.0)
    counts.use(AFTER, 0)
    counts.add(((10, 20), (30, 40)), 100.0)
    assert counts.snapshot(100.0).rows().tolist() == [[1, 12, 20], [30, 43, 0]]
    counts.use(BEFORE, 1)
    counts.add(((0, 5), (6, 0)), 100.0)
    assert counts.snapshot(100.0).rows().tolist() == [[1, 12, 25], [36, 43, 0]]


@pytest.mark.parametrize("days", [0.01, 1, 1000])
def test_long_times_neither_overflow_nor_lose_what_is_new(days: float) -> None:
    counts = counter()
    counts.add(((1, 1), (1,)), 100.0)
    later_s = 100.0 + days * 86400
    counts.add(((2, 0), (0,)), later_s)
    rows = counts.snapshot(later_s).rows()
    assert np.isfinite(rows).all() and rows[0, 0] == pytest.approx(2.0) and rows[0, 1] < 1e-20


def test_rows_of_another_placement_are_refused() -> None:
    with pytest.raises(ValueError, match="iterator too short"):
        counter().add(((1,), (2,)), 100.0)


def test_a_model_without_experts_counts_nothing() -> None:
    counts = ExpertLoadCounter(0, 0, HALF_LIFE_S, now_s=0.0)
    counts.use(Placement(2, ()), 0)
    counts.add((), 1.0)
    assert counts.snapshot(1.0).num_rows == 0.0
