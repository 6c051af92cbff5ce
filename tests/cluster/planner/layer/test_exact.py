"""The placement of one layer: legal always, near the bound, and still where nothing needs to move."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from cluster.planner.layer.error import PlacementError
from cluster.planner.layer.exact import solve_exact
from cluster.planner.layer.linear_program import lower_bound
from cluster.planner.layer.problem import LayerProblem, LayerSolution, holders_mask, split_matrix
from tests.cluster.planner.layer.layer_instances import layer_problems, zipf_costs


def assert_legal(problem: LayerProblem, solution: LayerSolution) -> None:
    num_experts, num_members = problem.costs_EM.shape
    assert len(solution.holders) == len(solution.split) == num_experts
    for ranks, parts in zip(solution.holders, solution.split, strict=True):
        assert list(ranks) == sorted(set(ranks)) and len(ranks) >= problem.min_copies
        assert len(parts) == len(ranks) and min(parts) >= 0 and sum(parts) == pytest.approx(1)
    held_EM = holders_mask(solution.holders, num_members)
    assert (held_EM.sum(axis=0) <= problem.slots_M).all()
    fraction_EM = split_matrix(solution.holders, solution.split, num_members)
    seconds_M = (fraction_EM * problem.costs_EM).sum(axis=0)
    assert solution.step_s == pytest.approx(seconds_M.max())
    assert lower_bound(problem) <= solution.bound_s * (1 + 1e-6) <= solution.step_s * (1 + 2e-6)
    assert solution.num_moved == (held_EM & ~problem.previous_EM()).sum()


@settings(max_examples=40)
@given(layer_problems())
def test_the_exact_placement_is_legal_and_above_its_bound(problem: LayerProblem) -> None:
    assert_legal(problem, solve_exact(problem, time_limit_s=1.0))


def test_the_fast_member_with_little_memory_holds_the_hottest_experts() -> None:
    costs_EM = zipf_costs(16, (8.0, 1.0, 1.0), exponent=1.0)
    solution = solve_exact(LayerProblem(costs_EM, slots_M=(4, 8, 8)))
    hottest = np.argsort(-costs_EM[:, 0])[:4]
    assert all(0 in solution.holders[expert] for expert in hottest)
    assert solution.step_s <= 1.01 * solution.bound_s


def test_slots_follow_speed_where_memory_allows() -> None:
    solution = solve_exact(LayerProblem(zipf_costs(64, (4.0, 2.0, 1.0, 1.0), exponent=0.0), slots_M=(64,) * 4))
    assert holders_mask(solution.holders, 4).sum(axis=0).tolist() == [32, 16, 8, 8]
    assert solution.step_s == pytest.approx(1 / 8)


def test_one_hot_expert_is_split_by_speed() -> None:
    solution = solve_exact(LayerProblem(np.array([[1.0, 1.0 / 3]]), slots_M=(1, 1)))
    assert solution.holders == ((0, 1),)
    assert solution.split[0] == pytest.approx((0.25, 0.75))


def test_a_member_that_only_hurts_holds_nothing() -> None:
    fast = zipf_costs(8, (1.0, 1.0), exponent=0.0)
    slow = np.concatenate([fast, np.full((8, 1), 500.0)], axis=1)
    solution = solve_exact(LayerProblem(slow, slots_M=(4, 4, 8)))
    assert all(2 not in ranks for ranks in solution.holders)


def test_a_good_placement_stays() -> None:
    costs_EM = zipf_costs(64, (8.0, 4.0, 2.0, 1.0), exponent=0.8)
    first = solve_exact(LayerProblem(costs_EM, slots_M=(30, 20, 15, 15)))
    again = solve_exact(LayerProblem(costs_EM, slots_M=(30, 20, 15, 15), previous=first.holders))
    assert again.holders == first.holders and again.num_moved == 0


def test_a_new_load_moves_few_copies() -> None:
    first = solve_exact(LayerProblem(zipf_costs(16, (4.0, 1.0, 1.0), 1.0), slots_M=(8, 8, 8)))
    changed = zipf_costs(16, (4.0, 1.0, 1.0), 1.0, seed=1)
    other = solve_exact(LayerProblem(changed, slots_M=(8, 8, 8), previous=first.holders))
    fresh = solve_exact(LayerProblem(changed, slots_M=(8, 8, 8)))
    moved_by_fresh = (holders_mask(fresh.holders, 3) & ~holders_mask(first.holders, 3)).sum()
    assert other.step_s <= fresh.step_s * 1.003
    assert other.num_moved <= moved_by_fresh


def test_no_experts_are_no_problem() -> None:
    solution = solve_exact(LayerProblem(np.zeros((0, 2)), slots_M=(0, 0)))
    assert solution.holders == () and solution.step_s == 0.0 == lower_bound(LayerProblem(np.zeros((0, 2)), (0, 0)))


@pytest.mark.parametrize(("problem", "says"), [
    (lambda: LayerProblem(np.ones((4, 2)), (1, 2)), "4 experts in 1 copies need 4 slots, the members have 3"),
    (lambda: LayerProblem(np.ones((2, 2)), (9, 1), 2), "need 4 slots, the members have 3"),
    (lambda: LayerProblem(np.ones((2, 1)), (4,), 2), "min_copies=2 with 1 members"),
    (lambda: LayerProblem(np.array([[1.0, np.nan]]), (1, 1)), "expert 0 costs member 1 nan seconds"),
    (lambda: LayerProblem(np.array([[1.0, -2.0]]), (1, 1)), "expert 0 costs member 1 -2.0 seconds"),
    (lambda: LayerProblem(np.ones((1, 2)), (1,)), "1 slots for 2 members"),
    (lambda: LayerProblem(np.ones((1, 2)), (1, 1), previous=((0, 3),)), "expert 0 on members \\(0, 3\\), there are 2"),
    (lambda: LayerProblem(np.ones((1, 2)), (1, 1), previous=()), "the previous placement has 0 experts, the layer 1"),
])
def test_a_wrong_problem_says_what_is_wrong(problem: object, says: str) -> None:
    assert callable(problem)
    with pytest.raises(PlacementError, match=says):
        problem()
