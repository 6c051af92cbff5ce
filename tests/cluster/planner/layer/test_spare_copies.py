from __future__ import annotations

import numpy as np
import pytest

from cluster.planner.layer.problem import Holders
from cluster.planner.layer.spare_copies import SPARE_PART, add_spare_copies, spare_split
from model.arrays import FloatArray
from model.dispatch.row_split import layer_copies, split_rows
from model.placement import ExpertRate

NUM_EXPERTS, NUM_CHOSEN = 64, 4
SPEEDS = (8.0, 4.0, 2.0, 1.0, 1.0)
RATES = tuple(ExpertRate(1.0 / speed, 0.15 / speed, 0.6 / speed) for speed in SPEEDS)
EVEN = np.full(NUM_EXPERTS, NUM_CHOSEN / NUM_EXPERTS)


def by_speed(num_experts: int = NUM_EXPERTS) -> Holders:
    """One copy of each, as many as the speeds say."""
    ends = np.cumsum(SPEEDS) / sum(SPEEDS) * num_experts
    return tuple((int(np.searchsorted(ends, expert, side="right")),) for expert in range(num_experts))


def num_held(holders: Holders) -> list[int]:
    return [sum(rank in ranks for ranks in holders) for rank in range(len(SPEEDS))]


def slots(holders: Holders, more: int) -> list[int]:
    return [count + more for count in num_held(holders)]


def mean_step(holders: Holders, num_rows: int, num_steps: int = 60) -> float:
    """Return the mean of steps in which rows choose experts at random, over what these take when nobody ever waits."""
    draw = np.random.default_rng(0)
    copies = layer_copies(holders, len(SPEEDS), RATES)
    ratios = []
    for _ in range(num_steps):
        chosen = draw.random((num_rows, NUM_EXPERTS)).argsort(axis=1)[:, :NUM_CHOSEN]
        rows_EM = split_rows(copies, np.bincount(chosen.ravel(), minlength=NUM_EXPERTS))
        finish_M = [sum(rate.seconds(rows) for rows in rows_EM[:, rank]) for rank, rate in enumerate(RATES)]
        work = sum(finish * speed for finish, speed in zip(finish_M, SPEEDS, strict=True))
        ratios.append(max(finish_M) * sum(SPEEDS) / work)
    return float(np.mean(ratios))


@pytest.mark.parametrize("num_rows", [64, 256])
def test_few_copies_take_most_of_what_the_slowest_member_is_waited_for(num_rows: int) -> None:
    holders = by_speed()
    more = add_spare_copies(holders, slots(holders, 3), EVEN, None, may_load=True)
    before, after = mean_step(holders, num_rows) - 1, mean_step(more, num_rows) - 1
    assert after < 0.55 * before


def test_copies_keep_to_the_slots_and_to_the_spare_part() -> None:
    holders = by_speed()
    tight = slots(holders, 0)
    assert add_spare_copies(holders, tight, EVEN, None, may_load=True) == holders
    more = add_spare_copies(holders, slots(holders, 50), EVEN, None, may_load=True)
    assert sum(num_held(more)) - NUM_EXPERTS == round(SPARE_PART * NUM_EXPERTS) + len(SPEEDS)
    assert all(set(ranks) <= set(wider) for ranks, wider in zip(holders, more, strict=True))
    assert all(after > before for before, after in zip(num_held(holders), num_held(more), strict=True))


def test_who_holds_nothing_stays_without() -> None:
    holders: Holders = ((0,), (0,), (1,))
    more = add_spare_copies(holders, (3, 3, 3), np.ones(3), None, may_load=True)
    assert more == ((0, 1), (0,), (0, 1))


def test_copies_that_are_there_stay_and_others_are_loaded_only_where_they_may_be() -> None:
    holders: Holders = ((0,), (1,), (0,), (1,))
    before: Holders = ((0, 1), (1,), (1,), ())
    assert add_spare_copies(holders, (3, 3), np.ones(4), before, may_load=False) == ((0, 1), (1,), (0,), (1,))
    kept = add_spare_copies(holders, (4, 4), np.ones(4), before, may_load=False)
    assert kept == ((0, 1), (1,), (0, 1), (1,))
    full = add_spare_copies(holders, (4, 4), np.ones(4), None, may_load=True)
    assert add_spare_copies(holders, (4, 4), np.ones(4), full, may_load=True) == full     # and then it is at rest


def test_hot_experts_are_copied_first() -> None:
    holders: Holders = tuple((expert % 2,) for expert in range(16))
    probability_E: FloatArray = np.arange(16) / 16
    more = add_spare_copies(holders, (10, 10), probability_E, None, may_load=True)
    assert [expert for expert, ranks in enumerate(more) if len(ranks) > 1] == [12, 13, 14, 15]


def test_spare_copies_are_expected_to_compute_nothing() -> None:
    assert spare_split(((1.0,), (0.25, 0.75)), ((1,), (0, 2)), ((0, 1), (0, 1, 2))) == ((0.0, 1.0), (0.25, 0.0, 0.75))
