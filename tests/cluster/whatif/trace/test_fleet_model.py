"""A fleet's step takes as long as its members' parts of the rows, all done at the same time."""

from __future__ import annotations

import pytest

from cluster.autoscaler.capability import GROUP_EFFICIENCY
from tests.cluster.whatif.trace.simulated import SPEED, model


def test_one_replica_is_as_fast_as_its_curve() -> None:
    for rows in (1, 8, 30, 200, 512):
        assert model().step_s((1,), rows) == pytest.approx(SPEED.seconds(rows), rel=0.01)
    assert model().step_s((1,), 1024) == pytest.approx(2 * SPEED.seconds(512))


def test_two_take_as_long_as_one_with_half_of_the_rows() -> None:
    fleet = model()
    for rows in (40, 200, 900):
        assert fleet.step_s((2,), rows * GROUP_EFFICIENCY) == pytest.approx(SPEED.seconds(rows / 2), rel=0.03)
        assert fleet.rows_within((2,), fleet.step_s((2,), rows)) == pytest.approx(rows, rel=0.01)


def test_it_says_who_holds_the_model_and_what_is_left() -> None:
    assert not model().holds((1,)) and model().holds((2,))
    assert model().kv_room((1,)) == 0 < model().kv_room((2,)) < model().kv_room((3,))
