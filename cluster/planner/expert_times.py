"""What a member's measured curves say about any number of rows. Pure.

R rows of a step, E experts of a layer
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from cluster.planner.device_curves import seconds_at
from cluster.planner.layer.error import PlacementError
from model.placement import ExpertRate
from serving.link.epoch import Curve, DeviceProfile

FloatArray = NDArray[np.float64]
START_PARTS = tuple(step / 16 for step in range(17))     # of read_s, that are tried as start_s
MANY_ROWS = 4096            # above it the number of an expert's rows is taken as its mean


def fit_rate(curve: Curve) -> ExpertRate:
    """max(read_s, start_s + row_s * rows) nearest to the curve: the points up to some one give read_s, the others row_s
    for each of some parts of read_s as start_s."""
    rows_P, seconds_P = np.array(curve, dtype=np.float64).T
    best = (math.inf, ExpertRate(float(seconds_P[0]), float(seconds_P[-1] / rows_P[-1])))
    for num_reads, part in itertools.product(range(1, len(curve) + 1), START_PARTS):
        read_s = math.exp(np.log(seconds_P[:num_reads]).mean())
        points = slice(num_reads, None) if num_reads < len(curve) else slice(-1, None)
        per_row = (seconds_P[points] - part * read_s) / rows_P[points]
        if (per_row > 0).all():
            rate = ExpertRate(read_s, math.exp(np.log(per_row).mean()), part * read_s)
            fitted_P = np.maximum(read_s, rate.start_s + rate.row_s * rows_P)
            error = float(np.square(np.log(fitted_P / seconds_P)).sum())
            best = min(best, (error, rate), key=lambda choice: choice[0])
    return best[1]


def expert_rate(profile: DeviceProfile) -> ExpertRate:
    """The two regimes of one expert: its weights are read, or its rows count."""
    return fit_rate(profile.expert_s)


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
    """The chance that a row chooses each expert, in proportion to the loads, at most 1, in all `num_chosen`.

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


def check_profile(name: str, profile: DeviceProfile) -> None:
    """Raises PlacementError that names the member and the value."""
    for what in ("expert_s", "dense_s", "head_s"):
        _check_curve(name, what, getattr(profile, what))
    speeds = [("read_bytes_per_s", profile.read_bytes_per_s)]
    speeds += [("gemm_flop_per_s", flops) for _, flops in profile.gemm_flop_per_s]
    speeds += [("link.bytes_per_s", profile.link.bytes_per_s)] if profile.link else []
    speeds += [("emulated_speed", profile.emulated_speed)] if profile.emulated_speed is not None else []
    times = [("attention_s", profile.attention_s), ("layer_overhead_s", profile.layer_overhead_s)]
    times += [("link.latency_s", profile.link.latency_s)] if profile.link else []
    for what, value in speeds:
        if not 0 < value < math.inf:
            raise _wrong(name, what, value, "a speed is finite and above zero")
    for what, value in times:
        if not 0 <= value < math.inf:
            raise _wrong(name, what, value, "a time is finite and not below zero")


def _check_curve(name: str, what: str, curve: Curve) -> None:
    if not curve:
        raise _wrong(name, what, "empty", "it needs the time of one row at least")
    rows = [point[0] for point in curve]
    if rows != sorted(set(rows)) or rows[0] < 1:
        raise _wrong(name, what, f"for rows {rows}", "rows ascend from 1 on")
    for num_rows, seconds in curve:
        if not 0 < seconds < math.inf:
            raise _wrong(name, f"{what} of {num_rows} rows", seconds, "a time is finite and above zero")


def _wrong(name: str, what: str, value: object, rule: str) -> PlacementError:
    return PlacementError(f"member {name}: {what} is {value}; {rule}", fix="measure this member again, or leave it out")
