"""The linear program behind a layer's placement, relaxed or with whole copies, solved by HiGHS. Pure.

Variables: fraction_EM, the part of an expert's rows that a member computes; copies_EM, whether it holds a copy; T, the
time of the slowest member. Times are scaled to about 1 because HiGHS' tolerances are absolute.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from cluster.planner.layer.problem import LayerProblem
from model.arrays import BoolArray, FloatArray, IntArray

SLACK = 1e-6            # HiGHS' tolerance: a bound is lowered by so much, relatively, before it is called one


@dataclass(frozen=True, slots=True)
class Solved:
    """The seconds that one solve found, and per (expert, member) the fractions described above."""

    fraction_EM: FloatArray
    copies_EM: FloatArray
    step_s: float
    bound_s: float          # proven for this model; 0 when moves counted too


@dataclass(frozen=True, slots=True)
class LayerModel:
    """The question of a solve: `held_EM` copies are there, `open_EM` copies may be added. Disjoint."""

    problem: LayerProblem
    held_EM: BoolArray
    open_EM: BoolArray
    move_cost: float = 0.0              # of a copy that `previous` has not, as a part of the step's time
    max_moves: int | None = None
    max_step_s: float | None = None     # minimize the moves alone, within this time

    def relaxed(self) -> Solved | None:
        """Solve with copies in fractions. None when not even that is possible."""
        return self._solve(is_integral=False, time_limit_s=60.0, gap=0.0)

    def integral(self, time_limit_s: float, gap: float = 5e-4) -> Solved | None:
        """Solve with whole copies: the best found in the time. None when none was found."""
        # Measured on small layers: HiGHS finds and proves the best two to three times faster without its presolve.
        return self._solve(is_integral=True, time_limit_s=time_limit_s, gap=gap)

    def _solve(self, is_integral: bool, time_limit_s: float, gap: float) -> Solved | None:
        problem, scale = self.problem, time_scale(self.problem)
        layout = _Layout(self, scale, has_copies=is_integral or problem.min_copies > 1)
        if layout.num_pairs == 0:
            return self._nothing_to_decide()
        num_variables = layout.num_variables
        upper = np.ones(num_variables)
        upper[-1] = np.inf if self.max_step_s is None else self.max_step_s / scale
        integrality = np.zeros(num_variables)
        if is_integral:
            integrality[layout.num_pairs:-1] = 1
        result = milp(layout.objective(), integrality=integrality, bounds=Bounds(np.zeros(num_variables), upper),
                      constraints=layout.constraints(),
                      options={"time_limit": time_limit_s, "mip_rel_gap": gap, "presolve": not is_integral})
        if result.x is None:
            return None
        bound = (result.mip_dual_bound if is_integral else result.fun) or 0.0
        is_time_alone = not self.move_cost and self.max_step_s is None and self.max_moves is None
        return layout.solved(result.x, max(0.0, bound) * scale * (1 - SLACK) if is_time_alone else 0.0)

    def _nothing_to_decide(self) -> Solved:
        fraction_EM = self.held_EM.astype(np.float64)
        step_s = float(member_seconds(self.problem, fraction_EM).max())
        return Solved(fraction_EM, fraction_EM.copy(), step_s, step_s)


def time_scale(problem: LayerProblem) -> float:
    """Return about the seconds that the slowest member takes."""
    spread = problem.costs_EM.min(axis=1).sum() / len(problem.slots_M)
    return max(float(spread), 1e-30)


def member_seconds(problem: LayerProblem, fraction_EM: FloatArray) -> FloatArray:
    seconds_M: FloatArray = (fraction_EM * problem.costs_EM).sum(axis=0)
    return seconds_M


def everything_open(problem: LayerProblem, move_cost: float = 0.0) -> LayerModel:
    held_EM = np.zeros(problem.costs_EM.shape, dtype=np.bool_)
    return LayerModel(problem, held_EM, ~held_EM, move_cost)


def lower_bound(problem: LayerProblem) -> float:
    """Return the seconds that no placement in these slots can beat: copies may be fractions."""
    if not len(problem.costs_EM):
        return 0.0
    solved = everything_open(problem).relaxed()
    assert solved is not None, "LayerProblem checks that there is room"
    return solved.bound_s


def best_split(problem: LayerProblem, held_EM: BoolArray) -> tuple[float, FloatArray]:
    """Split the rows over given copies: (seconds of the slowest member, fraction_EM)."""
    solved = LayerModel(problem, held_EM, np.zeros_like(held_EM)).relaxed()
    assert solved is not None, "every expert has a holder"
    return solved.step_s, solved.fraction_EM


class _Layout:
    """The columns and rows of the program.

    Columns: rows of each pair that may compute, copies of each open pair (left out when a copy is as much as its rows),
    T. An expert with one held copy and no open one is a constant.
    """

    def __init__(self, model: LayerModel, scale: float, has_copies: bool) -> None:
        self.model, self.scale, self.has_copies = model, scale, has_copies
        usable_EM = model.held_EM | model.open_EM
        self.is_fixed_E = (usable_EM.sum(axis=1) == 1) & model.held_EM.any(axis=1)
        self.pair_expert, self.pair_member = np.nonzero(usable_EM & ~self.is_fixed_E[:, None])
        self.num_pairs = len(self.pair_expert)
        self.open_pairs = np.flatnonzero(model.open_EM[self.pair_expert, self.pair_member])
        first = self.num_pairs if has_copies else 0
        self.copy_columns = first + (np.arange(len(self.open_pairs)) if has_copies else self.open_pairs)
        self.num_variables = self.num_pairs + (len(self.open_pairs) if has_copies else 0) + 1

    def objective(self) -> FloatArray:
        objective = np.zeros(self.num_variables)
        if self.model.max_step_s is None:
            objective[-1] = 1.0
            objective[self.copy_columns] = self.model.move_cost * self._is_new()
        else:
            objective[self.copy_columns] = self._is_new()
        return objective

    def _is_new(self) -> FloatArray:
        previous_EM = self.model.problem.previous_EM()
        experts, members = self.pair_expert[self.open_pairs], self.pair_member[self.open_pairs]
        return np.where(previous_EM[experts, members], 0.0, 1.0)

    def constraints(self) -> list[LinearConstraint]:
        parts = [self._time(), self._all_rows(), self._slots(), self._moves()]
        if self.has_copies:
            parts += [self._min_copies(), self._rows_need_a_copy()]
        return [part for part in parts if part is not None]

    def _time(self) -> LinearConstraint:
        problem, num_members = self.model.problem, len(self.model.problem.slots_M)
        fixed_M = (self.model.held_EM * problem.costs_EM)[self.is_fixed_E].sum(axis=0)
        cost = problem.costs_EM[self.pair_expert, self.pair_member] / self.scale
        members = np.arange(num_members)
        matrix = self._matrix(np.r_[cost, -np.ones(num_members)], np.r_[self.pair_member, members],
                              np.r_[np.arange(self.num_pairs), np.full(num_members, self.num_variables - 1)],
                              num_members)
        return LinearConstraint(matrix, -np.inf, -fixed_M / self.scale)

    def _all_rows(self) -> LinearConstraint:
        experts, row = np.unique(self.pair_expert, return_inverse=True)
        matrix = self._matrix(np.ones(self.num_pairs), row, np.arange(self.num_pairs), len(experts))
        return LinearConstraint(matrix, 1.0, 1.0)

    def _slots(self) -> LinearConstraint | None:
        if not len(self.open_pairs):
            return None
        free_M = self.model.problem.room_M - self.model.held_EM.sum(axis=0)
        matrix = self._matrix(np.ones(len(self.open_pairs)), self.pair_member[self.open_pairs], self.copy_columns,
                              len(free_M))
        return LinearConstraint(matrix, -np.inf, free_M)

    def _moves(self) -> LinearConstraint | None:
        if self.model.max_moves is None or not len(self.open_pairs):
            return None
        rows = np.zeros(len(self.open_pairs), dtype=np.int64)
        return LinearConstraint(self._matrix(self._is_new(), rows, self.copy_columns, 1), -np.inf, self.model.max_moves)

    def _min_copies(self) -> LinearConstraint | None:
        lacking_E = self.model.problem.min_copies - self.model.held_EM.sum(axis=1)
        if not len(self.open_pairs):
            return None
        matrix = self._matrix(np.ones(len(self.open_pairs)), self.pair_expert[self.open_pairs], self.copy_columns,
                              len(lacking_E))
        return LinearConstraint(matrix, np.where(self.is_fixed_E, 0, np.maximum(lacking_E, 0)), np.inf)

    def _rows_need_a_copy(self) -> LinearConstraint | None:
        count = len(self.open_pairs)
        if not count:
            return None
        rows = np.arange(count)
        matrix = self._matrix(np.r_[np.ones(count), -np.ones(count)], np.r_[rows, rows],
                              np.r_[self.open_pairs, self.copy_columns], count)
        return LinearConstraint(matrix, -np.inf, 0.0)

    def _matrix(self, values: FloatArray, rows: IntArray, columns: IntArray, num_rows: int) -> csr_matrix:
        return csr_matrix((values, (rows, columns)), shape=(num_rows, self.num_variables))

    def solved(self, x: FloatArray, bound_s: float) -> Solved:
        model, problem = self.model, self.model.problem
        fraction_EM = (model.held_EM & self.is_fixed_E[:, None]).astype(np.float64)
        rows = np.clip(x[:self.num_pairs], 0.0, 1.0)
        fraction_EM[self.pair_expert, self.pair_member] = np.where(rows < 1e-7, 0.0, rows)
        fraction_EM /= fraction_EM.sum(axis=1, keepdims=True)
        copies_EM = model.held_EM.astype(np.float64)
        copies_EM[self.pair_expert[self.open_pairs], self.pair_member[self.open_pairs]] = np.clip(
            x[self.copy_columns], 0.0, 1.0)
        return Solved(fraction_EM, copies_EM, float(member_seconds(problem, fraction_EM).max()), bound_s)
