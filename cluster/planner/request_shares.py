"""The members' parts in the requests: attention work and KV memory. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cluster.planner.costs.step_costs import StepCosts
from model.arrays import FloatArray
from serving.link.epoch import RequestShare

OwnSeconds = Callable[[int, float], float]      # (rank, rows) -> seconds
NUM_HALVINGS = 60
NUM_KNOTS = 96
MIN_TOKEN_BUDGET = 16


def share_rows(costs: StepCosts, takes_M: Sequence[bool], max_rows_M: Sequence[float] | None = None,
               own_experts_s: OwnSeconds | None = None) -> tuple[FloatArray, float]:
    """Share the rows so that the slowest member is done first: (rows, its seconds for its own rows of a step).

    `max_rows_M`: what its KV memory can hold. Where all together hold less than the rows, they count in proportion. A
    member whose one row would take longer than others need for all gets none. No shares are faster. `own_experts_s`: of
    a step, where members compute the experts of their own rows and of no others.
    """
    num_rows = float(costs.workload.num_rows)
    caps_M = np.array(max_rows_M if max_rows_M is not None else [num_rows] * len(takes_M), dtype=np.float64)
    caps_M = np.where(takes_M, np.minimum(caps_M, num_rows), 0.0)
    if not caps_M.any():
        caps_M = np.where(takes_M, num_rows, 0.0)       # nobody has any KV memory: by speed alone
    if caps_M.sum() < num_rows:
        caps_M *= num_rows / max(float(caps_M.sum()), 1e-30)
    inverses = [_RowsWithin(costs, rank, float(cap), own_experts_s) for rank, cap in enumerate(caps_M)]
    low_s, high_s = 0.0, max(inverse.longest_s for inverse in inverses)
    for _ in range(NUM_HALVINGS):
        middle_s = (low_s + high_s) / 2
        if sum(inverse.rows(middle_s) for inverse in inverses) >= num_rows:
            high_s = middle_s
        else:
            low_s = middle_s
    rows_M = np.array([inverse.rows(high_s) for inverse in inverses])
    return rows_M * (num_rows / rows_M.sum()), low_s


class _RowsWithin:
    """Says how many rows, up to `cap`, a member computes within a time. Its times are straight lines between knots."""

    def __init__(self, costs: StepCosts, rank: int, cap: float, own_experts_s: OwnSeconds | None) -> None:
        profile = costs.profiles[rank]
        knots = {float(point[0]) for curve in (profile.dense_s, profile.head_s, profile.expert_s) for point in curve}
        if own_experts_s:           # their expected time is no straight line
            knots |= set(np.geomspace(1e-3, max(cap, 1.0), NUM_KNOTS).tolist())
        self._rows = np.array(sorted({knot for knot in knots | {1.0} if knot < cap} | ({cap} if cap > 0 else set())))
        more_s = own_experts_s or (lambda rank, rows: 0.0)
        self._seconds = np.array([costs.own_rows_s(rank, rows) + more_s(rank, rows) for rows in self._rows])
        self.longest_s = float(self._seconds.max(initial=0.0))

    def rows(self, seconds: float) -> float:
        within = np.flatnonzero(self._seconds <= seconds)
        if not len(within):
            return 0.0
        last = int(within[-1])
        if last == len(self._rows) - 1:
            return float(self._rows[last])
        part = (seconds - self._seconds[last]) / (self._seconds[last + 1] - self._seconds[last])
        return float(self._rows[last] + part * (self._rows[last + 1] - self._rows[last]))


def request_shares(rows_M: Sequence[float], max_batch_tokens: int) -> tuple[RequestShare, ...]:
    """Make shares and token budgets in proportion to the rows; the largest share gets the whole budget."""
    total, most = sum(rows_M), max(rows_M)
    least_budget = min(max_batch_tokens, MIN_TOKEN_BUDGET)
    return tuple(RequestShare(rows / total, max(least_budget, int(max_batch_tokens * rows / most)) if rows > 0 else 0)
                 for rows in rows_M)
