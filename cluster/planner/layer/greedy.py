"""The quick placement of one layer: the relaxed program says where copies belong, a few rules make them whole. Pure.

For replans: what is there stays, and no more than 1.1 times the least possible is loaded when experts were lost.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cluster.planner.layer.linear_program import LayerModel, best_split, everything_open, lower_bound
from cluster.planner.layer.problem import LayerProblem, LayerSolution, mask_holders
from cluster.planner.layer.rounding import round_copies
from model.arrays import BoolArray, FloatArray

MOVE_COST = 1e-5            # of a copy, as a part of the step's time: moves decide between placements that are alike
ONLY_MOVES = 100.0          # a move costs more than any step
WORTH_MOVING = 1.005        # a placement that loses nothing is left only for one that is so much faster
HARDLY_USED = 0.02          # of its expert's rows: such a copy goes, if the step takes at most KEEPS_TIME times as long
KEEPS_TIME = 1.0005


def solve_greedy(problem: LayerProblem) -> LayerSolution:
    if not len(problem.costs_EM):
        return empty_solution()
    if problem.previous is None:
        solved = everything_open(problem).relaxed()
        assert solved is not None, "LayerProblem checks that there is room"
        held_EM = round_copies(problem, solved, max_moves=problem.costs_EM.size)
        return make_solution(problem, held_EM, solved.bound_s)
    is_overfull = bool((problem.previous_EM().sum(axis=0) > problem.room_M).any())
    if problem.num_lost() or is_overfull:
        # One copy of each takes no longer than more, and its bound a third of the time to find.
        bound_s = lower_bound(replace(problem, min_copies=1))
        return make_solution(problem, _restore(problem), bound_s)
    return _improve_where_it_pays(problem, lower_bound(problem))


def empty_solution() -> LayerSolution:
    return LayerSolution((), (), 0.0, 0.0, 0)


def make_solution(problem: LayerProblem, held_EM: BoolArray, bound_s: float) -> LayerSolution:
    """Split the rows at best, and drop new copies that are hardly used."""
    step_s, fraction_EM = best_split(problem, held_EM)
    fewer_EM = _without_unused(problem, held_EM, fraction_EM, HARDLY_USED)
    fewer_s, fewer_fraction_EM = best_split(problem, fewer_EM)
    if fewer_s <= step_s * KEEPS_TIME:
        held_EM, step_s, fraction_EM = fewer_EM, fewer_s, fewer_fraction_EM
    held_EM = _without_unused(problem, held_EM, fraction_EM, 0.0)
    holders = mask_holders(held_EM)
    split = tuple(tuple(fraction_EM[expert, list(ranks)].tolist()) for expert, ranks in enumerate(holders))
    num_moved = int((held_EM & ~problem.previous_EM()).sum())
    return LayerSolution(holders, split, step_s, min(bound_s, step_s), num_moved)


def _without_unused(problem: LayerProblem, held_EM: BoolArray, fraction_EM: FloatArray, part: float) -> BoolArray:
    held_EM, previous_EM = held_EM.copy(), problem.previous_EM()
    for expert, member in np.argwhere(held_EM & (fraction_EM <= part) & ~previous_EM):
        if held_EM[expert].sum() > problem.min_copies:
            held_EM[expert, member] = False
    return held_EM


def _restore(problem: LayerProblem) -> BoolArray:
    """Give lost experts holders again, and evict redundant copies where slots lack."""
    least, model = problem.num_lost(), replan_model(problem)
    solved = model.relaxed()
    if solved is None:          # free slots are where the lost experts still are: others must move too
        solved = everything_open(problem, ONLY_MOVES).relaxed()
        assert solved is not None, "LayerProblem checks that there is room"
        least = round(float(solved.copies_EM[~problem.previous_EM()].sum()))
    return round_copies(problem, solved, max_moves=least + least // 10)


def replan_model(problem: LayerProblem) -> LayerModel:
    """Let copies stay and find those of lost experts. Where slots lack, redundant ones may go."""
    previous_EM, room_M = problem.previous_EM(), problem.room_M
    num_copies_E = previous_EM.sum(axis=1)
    lacking_E = np.maximum(0, problem.min_copies - num_copies_E)
    held_EM = previous_EM.copy()
    free_M = room_M - held_EM.sum(axis=0)
    if free_M.min() < 0 or free_M.sum() < lacking_E.sum():
        held_EM[num_copies_E > problem.min_copies] = False
    is_overfull_M = held_EM.sum(axis=0) > room_M
    must_move_E = (held_EM & is_overfull_M).any(axis=1)
    held_EM[:, is_overfull_M] = False
    open_EM = previous_EM & ~held_EM
    open_EM[(lacking_E > 0) | must_move_E] = True
    return LayerModel(problem, held_EM, open_EM & ~held_EM, MOVE_COST, max_moves=problem.num_lost())


def _improve_where_it_pays(problem: LayerProblem, bound_s: float) -> LayerSolution:
    """Keep what is there, as nothing is lost, unless another placement is clearly faster."""
    kept = make_solution(problem, problem.previous_EM(), bound_s)
    if kept.step_s <= bound_s * WORTH_MOVING:
        return kept
    solved = everything_open(problem, MOVE_COST).relaxed()
    assert solved is not None, "LayerProblem checks that there is room"
    other = make_solution(problem, round_copies(problem, solved, max_moves=problem.costs_EM.size), bound_s)
    return other if other.step_s * WORTH_MOVING < kept.step_s else kept
