"""All that is computed in C is what numpy computes, number for number, on every kind of layer."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.dispatch import row_planner
from model.dispatch.compiled_row_planner import CompiledRowPlanner
from model.dispatch.row_plan import RowPlan, layer_routing
from model.dispatch.row_planner import NumpyRowPlanner, RowPlanner, row_planners
from model.kernels.packed_cpu_library import KernelLibrary, KernelLibraryError
from model.placement import ExpertRate, Placement
from tests.placements import contiguous_placement

LIBRARY = KernelLibrary()


def numbers_of(plan: RowPlan) -> tuple[list[object], ...]:
    arrivals, returns = plan.arrivals, plan.returns
    return (arrivals.num_rows_E, arrivals.source_row_R.tolist(), arrivals.departure_R.tolist(),
            arrivals.num_departures_M, returns.row_of_TK.tolist(), returns.num_returns_M, plan.token_S.tolist(),
            plan.num_sent_M, plan.place_R.tolist(), plan.num_received_M)


def assert_alike(placement: Placement, ids_SK: np.ndarray, num_rows_M: list[int]) -> None:
    """`num_rows_M` rows of each owner; all are real."""
    owner_S = np.repeat(np.arange(placement.num_members), num_rows_M)
    for rank in range(placement.num_members):
        own = slice(sum(num_rows_M[:rank]), sum(num_rows_M[:rank + 1]))
        routing = layer_routing(placement, 0, rank)
        expected = NumpyRowPlanner(routing).plan(ids_SK, owner_S, own)
        assert numbers_of(CompiledRowPlanner(routing, LIBRARY).plan(ids_SK, owner_S, own)) == numbers_of(expected)


def some_layer(rng: random.Random) -> tuple[Placement, np.ndarray, list[int]]:
    """Members of unequal speed, experts on one to all of them, popular and unpopular experts."""
    num_members, num_experts = rng.randint(1, 7), rng.choice((1, 3, 16, 64))
    num_per_token, most_copies = rng.randint(1, min(8, num_experts)), rng.randint(1, num_members)
    copied_part, read_s = rng.choice((0.0, 0.2, 1.0)), rng.choice((0.0, 1.0, 7.0, 60.0))
    holders = tuple(tuple(sorted(rng.sample(range(num_members), rng.randint(1, most_copies)
                                            if rng.random() < copied_part else 1))) for _ in range(num_experts))
    speeds = [rng.choice((1.0, 2.0, 4.0, 8.0)) * rng.uniform(0.9, 1.1) for _ in range(num_members)]
    part = rng.choice((0.0, 0.4, 1.0))
    rates = tuple(ExpertRate(read_s / speed, 1.0 / speed, part * read_s / speed) for speed in speeds)
    num_rows_M = [rng.choice((0, 1, rng.randint(0, 9), rng.randint(0, 90))) for _ in range(num_members)]
    popularity = np.array([rng.paretovariate(1.2) for _ in range(num_experts)])
    draw = np.random.default_rng(rng.randrange(1 << 30))
    keys = draw.random((sum(num_rows_M), num_experts)) ** (1.0 / popularity)
    ids_SK = np.sort(np.argsort(-keys, axis=1)[:, :num_per_token], axis=1).astype(np.int16)
    return Placement(num_members, (holders,), rates if rng.random() < 0.9 else ()), ids_SK, num_rows_M


@settings(max_examples=400)
@given(seed=st.integers(0, 2**32))
def test_c_and_numpy_plan_alike(seed: int) -> None:
    assert_alike(*some_layer(random.Random(seed)))


@pytest.mark.parametrize("rows_of_member", [200, 2000])
def test_they_plan_large_steps_alike(rows_of_member: int) -> None:
    """Every expert twice on members at 8:4:2:1:1:1: many passes of the split."""
    rng, num_experts = random.Random(rows_of_member), 128
    speeds = (8.0, 4.0, 2.0, 1.0, 1.0, 1.0)
    holders = tuple(tuple(sorted(rng.sample(range(6), 2))) for _ in range(num_experts))
    placement = Placement(6, (holders,), tuple(ExpertRate(12.0 / speed, 1.0 / speed, 3.0 / speed) for speed in speeds))
    scores = np.random.default_rng(0).random((6 * rows_of_member, num_experts)) + np.linspace(0.0, 0.3, num_experts)
    ids_SK = np.sort(np.argsort(-scores, axis=1)[:, :8], axis=1).astype(np.int16)
    assert_alike(placement, ids_SK, [rows_of_member] * 6)


@pytest.mark.parametrize("holders", [((0, 1), (1,), (0, 1)), ((0,), (1,), (1,))])
def test_padding_and_rows_that_lie_apart(holders: tuple[tuple[int, ...], ...]) -> None:
    routing = layer_routing(Placement(2, (holders,)), 0, 0)
    wide = np.full((4, 9), 77, dtype=np.int16)
    wide[:, 3:5] = [[0, 2], [3, 3], [0, 1], [3, 3]]         # 3 is padding
    owner_S, own = np.array([0, 0, 1, 1]), slice(0, 1)
    expected = numbers_of(NumpyRowPlanner(routing).plan(wide[:, 3:5].copy(), owner_S, own))
    assert numbers_of(CompiledRowPlanner(routing, LIBRARY).plan(wide[:, 3:5], owner_S, own)) == expected
    assert numbers_of(NumpyRowPlanner(routing).plan(wide[:, 3:5], owner_S, own)) == expected


@pytest.mark.parametrize("bad", [-1, 5, 32_767])
def test_ids_that_no_expert_has_are_refused(bad: int) -> None:
    planner = CompiledRowPlanner(layer_routing(contiguous_placement(2, 4, (2, 2)), 0, 0), LIBRARY)
    ids_SK, owner_S = np.array([[0, 1], [2, 4]], dtype=np.int16), np.array([0, 1])     # 4 is padding
    planner.plan(ids_SK, owner_S, slice(0, 1))
    ids_SK[1, 1] = bad
    with pytest.raises(ValueError, match="do not run the same model"):
        planner.plan(ids_SK, owner_S, slice(0, 1))


def kinds(planners: list[RowPlanner]) -> set[type]:
    return {type(planner) for planner in planners}


def test_without_a_library_rows_are_planned_in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = contiguous_placement(2, 4, (2, 2))
    assert kinds(row_planners(placement, 0)) == {CompiledRowPlanner}

    def absent() -> KernelLibrary:
        raise KernelLibraryError("none", fix="")
    monkeypatch.setattr(row_planner, "KernelLibrary", absent)
    assert kinds(row_planners(placement, 0)) == {NumpyRowPlanner}
