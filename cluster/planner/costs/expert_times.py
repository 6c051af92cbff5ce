"""The expected time of an expert in a step whose rows choose it by chance. Pure.

R rows of a step, E experts of a layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from cluster.planner.costs.device_curves import seconds_at
from model.arrays import FloatArray
from model.curve import Curve

MANY_ROWS = 4096            # above it the number of an expert's rows is taken as its mean


@dataclass(frozen=True, slots=True)
class ExpertTimes:
    """The expected time of an expert in a step of R rows, each of which chooses it with the same probability.

    With few rows that is the chance to be hit times the reading of the weights, with many it is linear. A table over
    probabilities, because a plan asks for many.
    """

    curve: Curve
    num_rows: int
    probabilities: FloatArray       # of the table, ascending
    seconds: FloatArray

    def expected(self, probability_E: FloatArray) -> FloatArray:
        if self.num_rows > MANY_ROWS:
            return seconds_at(self.curve, self.num_rows * probability_E)
        return np.interp(probability_E, self.probabilities, self.seconds)


def expert_times(curve: Curve, num_rows: int) -> ExpertTimes:
    if num_rows > MANY_ROWS:
        return ExpertTimes(curve, num_rows, np.zeros(0), np.zeros(0))
    probability_P = np.r_[0.0, np.geomspace(1e-5, 1.0, 192)]
    hits_N = np.arange(num_rows + 1)
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log(probability_P[1:-1, None]), np.log1p(-probability_P[1:-1, None])
    ways_N = gammaln(num_rows + 1) - gammaln(hits_N + 1) - gammaln(num_rows - hits_N + 1)
    chance_PN = np.exp(ways_N + hits_N * log_p + (num_rows - hits_N) * log_q)
    seconds_N = seconds_at(curve, hits_N.astype(np.float64))
    return ExpertTimes(curve, num_rows, probability_P, np.r_[0.0, chance_PN @ seconds_N, seconds_N[-1]])


def chosen_probability(load_E: Sequence[float], num_chosen: int) -> FloatArray:
    """Return the chance that a row chooses each expert, in proportion to the loads, at most 1, in all `num_chosen`.

    Equal chances where all loads are zero.
    """
    load = np.array(load_E, dtype=np.float64)
    load = load if load.any() else np.ones(len(load))
    probability_E = np.zeros(len(load))
    is_sure = np.zeros(len(load), dtype=np.bool_)
    for _ in range(num_chosen + 1):
        left, rest = num_chosen - int(is_sure.sum()), float(load[~is_sure].sum())
        if left <= 0 or rest <= 0:
            break
        probability_E = np.where(is_sure, 1.0, load * left / rest)
        if (probability_E <= 1).all():
            break
        is_sure |= probability_E >= 1
    return np.minimum(probability_E, 1.0)
