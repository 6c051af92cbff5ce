"""The best placement of one layer: mixed-integer programs by HiGHS from a good start, and what proves how good. Pure.

HiGHS cannot be given a start, and a whole layer is too much for it in seconds. So: the relaxed program decides most
experts; those it splits, and those of the slowest members, are decided by small programs; a layer small enough is
solved as a whole.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cluster.planner.layer.greedy import KEEPS_TIME, MOVE_COST, empty_solution, make_solution, solve_greedy
from cluster.planner.layer.linear_program import LayerModel, Solved, everything_open, lower_bound, member_seconds
from cluster.planner.layer.problem import LayerProblem, LayerSolution, holders_mask, split_matrix
from cluster.planner.layer.rounding import WHOLE, round_copies
from model.arrays import BoolArray

GOOD = 1.002                # of the bound: no better one is looked for
WHOLE_LAYER_PAIRS = 320     # experts x members that HiGHS gets as one program
NUM_ROUNDS = 8
FREE_EXPERTS = 24           # that a small program decides anew, at most half of the layer's


def solve_exact(problem: LayerProblem, time_limit_s: float = 3.0) -> LayerSolution:
    """Come within GOOD of the bound, or find the best in the time. Its step is never slower than solve_greedy's."""
    if not len(problem.costs_EM):
        return empty_solution()
    best = solve_greedy(problem)
    if problem.previous is not None:
        best = replace(best, bound_s=min(best.step_s, lower_bound(problem)))
    if _is_done(problem, best):
        return best
    best = _rounded(problem, best)
    is_small = problem.costs_EM.size <= WHOLE_LAYER_PAIRS
    if best.step_s > best.bound_s * GOOD:
        best = _by_small_programs(problem, best, time_limit_s * (0.2 if is_small else 0.7) / NUM_ROUNDS)
    if best.step_s > best.bound_s * GOOD and is_small:
        best = _whole_layer(problem, best, time_limit_s * 0.55)
    if problem.previous is not None and best.num_moved > problem.num_lost():
        best = _with_fewer_moves(problem, best, time_limit_s * 0.15)
    return best


def _is_done(problem: LayerProblem, solution: LayerSolution) -> bool:
    is_still = problem.previous is None or solution.num_moved <= problem.num_lost()
    return solution.step_s <= solution.bound_s * GOOD and is_still


def _better(problem: LayerProblem, best: LayerSolution, held_EM: BoolArray, bound_s: float = 0.0) -> LayerSolution:
    other = make_solution(problem, held_EM, max(best.bound_s, bound_s))
    if other.step_s < best.step_s * (1 - 1e-9):
        return other
    return replace(best, bound_s=min(best.step_s, other.bound_s))


def _rounded(problem: LayerProblem, best: LayerSolution) -> LayerSolution:
    """Round the relaxed placement, and take it where it is better."""
    relaxed = everything_open(problem, MOVE_COST if problem.previous is not None else 0.0).relaxed()
    assert relaxed is not None, "LayerProblem checks that there is room"
    return _better(problem, best, round_copies(problem, relaxed, max_moves=problem.costs_EM.size))


def _by_small_programs(problem: LayerProblem, best: LayerSolution, time_limit_s: float) -> LayerSolution:
    """Decide a few experts anew at a time, the others keep their copies."""
    relaxed = everything_open(problem).relaxed()
    assert relaxed is not None, "LayerProblem checks that there is room"
    best = _decide(problem, best, relaxed.copies_EM >= WHOLE, _split_experts(relaxed), time_limit_s)
    for turn in range(1, NUM_ROUNDS):
        if best.step_s <= best.bound_s * GOOD:
            break
        held_EM = holders_mask(best.holders, problem.costs_EM.shape[1])
        best = _decide(problem, best, held_EM, _experts_to_free(problem, best, turn), time_limit_s)
    return best


def _split_experts(relaxed: Solved) -> BoolArray:
    is_part_EM: BoolArray = (relaxed.copies_EM > 1 - WHOLE) & (relaxed.copies_EM < WHOLE)
    return np.asarray(is_part_EM.any(axis=1))


def _experts_to_free(problem: LayerProblem, best: LayerSolution, turn: int) -> BoolArray:
    """Choose those of the slowest members and those in several copies first, then by chance."""
    random = np.random.default_rng(turn)
    held_EM = holders_mask(best.holders, problem.costs_EM.shape[1])
    fraction_EM = split_matrix(best.holders, best.split, problem.costs_EM.shape[1])
    load_M = member_seconds(problem, fraction_EM)
    is_slowest_M: BoolArray = load_M >= load_M.max() * (1 - 1e-4)
    on_slowest_E = (held_EM & is_slowest_M).any(axis=1)
    priority_E = 0.5 * on_slowest_E + 0.5 * (held_EM.sum(axis=1) > problem.min_copies) + random.random(len(held_EM))
    is_free_E = np.zeros(len(held_EM), dtype=np.bool_)
    is_free_E[np.argsort(-priority_E)[:min(FREE_EXPERTS, -(-len(held_EM) // 2))]] = True
    return is_free_E


def _decide(problem: LayerProblem, best: LayerSolution, held_EM: BoolArray, is_free_E: BoolArray,
            time_limit_s: float) -> LayerSolution:
    held_EM = held_EM & ~is_free_E[:, None]
    open_EM = np.zeros_like(held_EM)
    open_EM[is_free_E] = True
    move_cost = MOVE_COST if problem.previous is not None else 0.0
    solved = LayerModel(problem, held_EM, open_EM, move_cost).integral(time_limit_s)
    return best if solved is None else _better(problem, best, solved.copies_EM >= 0.5)


def _whole_layer(problem: LayerProblem, best: LayerSolution, time_limit_s: float) -> LayerSolution:
    solved = everything_open(problem).integral(time_limit_s)
    return best if solved is None else _better(problem, best, solved.copies_EM >= 0.5, solved.bound_s)


def _with_fewer_moves(problem: LayerProblem, best: LayerSolution, time_limit_s: float) -> LayerSolution:
    """Look for a placement that is as fast, with fewer copies to load."""
    everything = everything_open(problem)
    model = replace(everything, max_step_s=best.step_s * KEEPS_TIME)
    solved = model.integral(time_limit_s, gap=1e-3)
    if solved is None:
        return best
    other = make_solution(problem, solved.copies_EM >= 0.5, best.bound_s)
    return other if other.num_moved < best.num_moved and other.step_s <= best.step_s * 1.001 else best
