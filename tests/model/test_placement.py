"""A placement is checked where it is made: ranks, rates and what a collective less is worth."""

from __future__ import annotations

import math

import pytest

from model.placement import ExpertRate, Placement

RATE = ExpertRate(read_s=1e-3, row_s=1e-5)


def test_experts_of_a_rank_are_its_slots_in_order() -> None:
    placement = Placement(3, (((0, 2), (1,), (0, 1, 2)), ((1,), (0, 1), (2,))))
    assert placement.num_layers == 2
    assert [placement.experts_of(0, rank) for rank in range(3)] == [(0, 2), (1, 2), (0, 2)]
    assert [placement.num_experts_of(rank) for rank in range(3)] == [3, 4, 3]


def test_a_rank_may_hold_nothing() -> None:
    placement = Placement(2, (((0,), (0,)),))
    assert placement.experts_of(0, 1) == () and placement.num_experts_of(1) == 0


@pytest.mark.parametrize(("holders", "message"), [
    ((((0,), ()),), "expert 1 has no holder"), ((((1, 0),),), "must ascend"), ((((0, 0),),), "must ascend"),
    ((((-1,),),), "within 0..1"), ((((2,),),), "within 0..1")])
def test_holders_are_ascending_ranks(holders: tuple[tuple[tuple[int, ...], ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(2, holders)


@pytest.mark.parametrize("rate", [
    ExpertRate(math.inf, 1e-5), ExpertRate(math.nan, 1e-5), ExpertRate(1e-3, 0.0), ExpertRate(1e-3, math.inf),
    ExpertRate(1e-3, 1e-5, start_s=2e-3), ExpertRate(1e-3, 1e-5, start_s=-1e-9)])
def test_rates_are_times_of_a_device(rate: ExpertRate) -> None:
    with pytest.raises(ValueError, match="rank 1 has"):
        Placement(2, (((0,),),), (RATE, rate))


def test_every_member_has_a_rate_or_none_has() -> None:
    with pytest.raises(ValueError, match="1 rates for 2 members"):
        Placement(2, (((0,),),), (RATE,))
    with pytest.raises(ValueError, match="collective_bytes=-1 is below zero"):
        Placement(2, (((0,),),), collective_bytes=-1)
    assert Placement(2, (((0,),),), (RATE, RATE), 0).collective_bytes == 0


def test_few_rows_cost_the_reading_and_many_their_number() -> None:
    rate = ExpertRate(read_s=1.0, row_s=0.1, start_s=0.5)
    assert [rate.seconds(rows) for rows in (0, 1, 5, 20)] == [0.0, 1.0, 1.0, 2.5]
