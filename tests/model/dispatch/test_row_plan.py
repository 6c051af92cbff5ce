"""The plans of all members fit together. That rows really arrive by them is in test_dispatch.py."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.dispatch.row_plan import (
    choose_holders,
    expected_shares,
    layer_routing,
    plan_arrivals,
    plan_receipts,
    plan_returns,
    plan_sends,
    reach_of,
)
from model.placement import ExpertRate, Placement
from tests.model.dispatch.dispatch_jobs import holders_of_rows
from tests.placements import contiguous_placement


@st.composite
def layers(draw: st.DrawFn) -> tuple[Placement, list[list[list[int]]]]:
    """A placement of one layer, and the expert ids [owner][token][k] of a step."""
    num_members, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    ranks = st.lists(st.integers(0, num_members - 1), min_size=1, max_size=num_members, unique=True)
    holders = [tuple(sorted(draw(ranks))) for _ in range(num_experts)]
    rates = [ExpertRate(draw(st.sampled_from([0.0, 1.0, 8.0])), draw(st.sampled_from([0.25, 1.0])))
             for _ in range(num_members)]
    num_per_token = draw(st.integers(1, num_experts))
    one_row = st.lists(st.integers(0, num_experts - 1), min_size=num_per_token, max_size=num_per_token, unique=True)
    rows = [draw(st.lists(one_row.map(sorted), max_size=12)) for _ in range(num_members)]
    return Placement(num_members, (tuple(holders),), tuple(rates)), rows


def as_arrays(rows_of_owner: list[list[list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    num_per_token = max((len(row) for rows in rows_of_owner for row in rows), default=1)
    ids_SK = np.array([row for rows in rows_of_owner for row in rows], dtype=np.int16).reshape(-1, num_per_token)
    return ids_SK, np.repeat(np.arange(len(rows_of_owner)), [len(rows) for rows in rows_of_owner])


@given(layer=layers())
def test_every_member_chooses_the_holders_that_the_rule_says(layer: tuple[Placement, list[list[list[int]]]]) -> None:
    placement, rows = layer
    ids_SK, owner_S = as_arrays(rows)
    expected = [row for of_owner in holders_of_rows(placement, 0, rows) for row in of_owner]
    for rank in range(placement.num_members):
        assert choose_holders(layer_routing(placement, 0, rank), ids_SK, owner_S).tolist() == expected


@settings(max_examples=150)
@given(layer=layers())
def test_what_one_member_sends_is_what_the_other_expects(layer: tuple[Placement, list[list[list[int]]]]) -> None:
    placement, rows = layer
    ids_SK, owner_S = as_arrays(rows)
    routings = [layer_routing(placement, 0, rank) for rank in range(placement.num_members)]
    holder_SK = choose_holders(routings[0], ids_SK, owner_S)
    own_holders = [holder_SK[owner_S == rank] for rank in range(placement.num_members)]
    sends = [plan_sends(routing, own) for routing, own in zip(routings, own_holders, strict=True)]
    returns = [plan_returns(routing, own) for routing, own in zip(routings, own_holders, strict=True)]
    first_row = [0, *accumulate(len(of_owner) for of_owner in rows)]
    for rank, routing in enumerate(routings):
        place_S, num_received_M = plan_receipts(routing, holder_SK, owner_S)
        assert num_received_M == [num_sent_M[rank] for _, num_sent_M in sends]
        arrived = [first_row[owner] + token for owner, (token_S, num_sent_M) in enumerate(sends)
                   for token in token_S[sum(num_sent_M[:rank]):sum(num_sent_M[:rank + 1])]]
        arrivals = plan_arrivals(routing, ids_SK, holder_SK, owner_S)
        assert [arrived[place] for place in place_S[arrivals.source_row_R]] == arrivals.source_row_R.tolist()
        assert arrivals.num_departures_M == [plan.num_returns_M[rank] for plan in returns]
        assert arrivals.num_rows_E == [int((ids_SK[holder_SK == rank] == expert).sum())
                                       for expert in placement.experts_of(0, rank)]


def test_padding_is_computed_by_nobody_and_moves_nothing_else() -> None:
    placement = Placement(2, (((0, 1), (1,), (0, 1)),))
    routing = layer_routing(placement, 0, 0)
    ids_SK, owner_S = np.array([[0, 2], [3, 3], [0, 1], [3, 3]], dtype=np.int16), np.array([0, 0, 1, 1])
    holder_SK = choose_holders(routing, ids_SK, owner_S)
    assert holder_SK[[1, 3]].tolist() == [[2, 2], [2, 2]]
    real = [0, 2]
    assert holder_SK[real].tolist() == choose_holders(routing, ids_SK[real], owner_S[real]).tolist()


@pytest.mark.parametrize(("placement", "num_experts_per_token", "expected"), [
    (contiguous_placement(1, 4, (2, 2)), 1, (0.5, 0.5)),
    (contiguous_placement(1, 4, (2, 2)), 2, (0.75, 0.75)),
    (contiguous_placement(1, 4, (4, 0)), 2, (0.0, 1.0)),
    (Placement(2, (((0, 1),) * 4,)), 2, (0.0, 0.0)),                                    # everybody keeps its rows
    (Placement(2, (((0, 1),) * 4,), (ExpertRate(1.0, 1.0), ExpertRate(3.0, 3.0))), 1, (0.0, 0.5)),
    (Placement(3, (((1, 2),) * 4,)), 1, (1.0, 0.0, 0.0)),
])
def test_reach_is_the_expected_number_of_other_members(
        placement: Placement, num_experts_per_token: int, expected: tuple[float, ...]) -> None:
    for rank in range(placement.num_members):
        found = reach_of(expected_shares(layer_routing(placement, 0, rank)), num_experts_per_token)
        assert found == pytest.approx(expected, abs=1e-3)


@given(layer=layers())
def test_expected_shares_are_those_of_a_step_with_many_rows(layer: tuple[Placement, list[list[list[int]]]]) -> None:
    """One expert a row, every expert from every owner equally often."""
    placement, num_rows = layer[0], 400
    num_experts = len(placement.holders[0])
    routing = layer_routing(placement, 0, 0)
    ids_SK = np.tile(np.arange(num_experts, dtype=np.int16).repeat(num_rows), placement.num_members)[:, None]
    owner_S = np.arange(placement.num_members).repeat(num_experts * num_rows)
    holder_S = choose_holders(routing, ids_SK, owner_S)[:, 0]
    expected = expected_shares(routing)
    assert expected.sum(axis=1) == pytest.approx(1.0, abs=1e-3)
    for owner in range(placement.num_members):
        assert expected[owner, owner] == pytest.approx((holder_S[owner_S == owner] == owner).mean(), abs=0.02)


def test_more_experts_than_ids_can_name_are_refused() -> None:
    with pytest.raises(ValueError, match="32768 experts"):
        layer_routing(contiguous_placement(1, 32_768, (32_768,)), 0, 0)
