"""Replans of one layer: legal, within the memory, moving little."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from benchmarks.placement_rules import least_moves
from cluster.planner.layer.exact import solve_exact
from cluster.planner.layer.greedy import solve_greedy
from cluster.planner.layer.problem import Holders, LayerProblem, holders_mask
from tests.cluster.planner.layer.layer_instances import layer_problems, zipf_costs
from tests.cluster.planner.layer.test_exact import assert_legal

SPEEDS = (8.0, 4.0, 2.0, 1.0, 1.0)


def without(holders: Holders, gone: int) -> Holders:
    return tuple(tuple(rank - (rank > gone) for rank in ranks if rank != gone) for ranks in holders)


@settings(max_examples=60)
@given(layer_problems())
def test_the_greedy_placement_is_legal_and_not_faster_than_the_exact_one(problem: LayerProblem) -> None:
    greedy = solve_greedy(problem)
    assert_legal(problem, greedy)
    assert solve_exact(problem, time_limit_s=0.5).step_s <= greedy.step_s * 1.001


@pytest.mark.parametrize("min_copies", [1, 2])
@pytest.mark.parametrize("gone", range(5))
def test_after_a_loss_little_more_than_what_was_lost_is_loaded(gone: int, min_copies: int) -> None:
    costs_EM, slots = zipf_costs(64, SPEEDS, 0.7), (40, 40, 40, 40, 40)
    before = solve_exact(LayerProblem(costs_EM, slots, min_copies))
    problem = LayerProblem(np.delete(costs_EM, gone, axis=1), slots[:4], min_copies,
                           previous=without(before.holders, gone))
    after = solve_greedy(problem)
    assert_legal(problem, after)
    assert after.num_moved <= 1.1 * least_moves(problem)
    assert min(len(ranks) for ranks in after.holders) >= min_copies


def test_redundant_copies_make_room_for_lost_experts() -> None:
    previous: Holders = ((0, 1), (0, 1), (), ())
    solution = solve_greedy(LayerProblem(np.ones((4, 2)), (2, 2), previous=previous))
    assert sorted(len(ranks) for ranks in solution.holders) == [1, 1, 1, 1]
    assert solution.num_moved == 2


def test_a_member_with_less_memory_than_before_gives_copies_away() -> None:
    previous: Holders = ((0,), (0,), (0,), (1,))
    solution = solve_greedy(LayerProblem(np.ones((4, 2)), (2, 3), previous=previous))
    assert holders_mask(solution.holders, 2).sum(axis=0).tolist() == [2, 2]
    assert solution.num_moved == 1


def test_free_slots_in_the_wrong_place_move_other_experts_too() -> None:
    previous: Holders = ((0,), (1, 2), (1, 2))
    problem = LayerProblem(np.ones((3, 3)), (3, 2, 2), min_copies=2, previous=previous)
    solution = solve_greedy(problem)
    assert_legal(problem, solution)
    assert solution.num_moved == least_moves(problem) == 2


def test_a_new_member_gets_what_pays() -> None:
    costs_EM = zipf_costs(32, (1.0, 1.0, 2.0), exponent=0.0)
    previous: Holders = tuple((expert % 2,) for expert in range(32))
    solution = solve_greedy(LayerProblem(costs_EM, (32, 32, 32), previous=previous))
    assert solution.step_s <= 1.05 * solution.bound_s
    assert solution.num_moved == 16
