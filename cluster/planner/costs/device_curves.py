"""Measured curves, read at any number of rows. Pure, and without SciPy.

N values of a number of rows, P points of a curve
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from model.arrays import FloatArray
from model.curve import Curve
from model.placement import ExpertRate
from serving.link.epoch import DeviceProfile

START_PARTS = tuple(step / 16 for step in range(17))     # of read_s, that are tried as start_s


def scaled(curve: Curve, factor: float) -> Curve:
    """Return the curve of a device on which everything takes so many times as long."""
    return tuple((rows, seconds * factor) for rows, seconds in curve)


def curve_seconds(curve: Curve, num_rows: float) -> float:
    """Read the curve at one number of rows, as `seconds_at` does."""
    return float(seconds_at(curve, np.array([num_rows], dtype=np.float64))[0])


def seconds_at(curve: Curve, rows_N: FloatArray) -> FloatArray:
    """Read straight lines between the points, and the last slope beyond. Less than one row takes that part of one's."""
    first, last = curve[0], curve[-1]
    before = curve[-2] if len(curve) > 1 else (0, 0.0)
    slope = max(0.0, (last[1] - before[1]) / (last[0] - before[0]))
    seconds_N = np.interp(rows_N, [point[0] for point in curve], [point[1] for point in curve])
    seconds_N = seconds_N + slope * np.maximum(0.0, rows_N - last[0])
    return np.where(rows_N < 1, np.clip(rows_N, 0, 1) * first[1], seconds_N)


def fit_rate(curve: Curve) -> ExpertRate:
    """Find the max(read_s, start_s + row_s * rows) that is nearest to the curve.

    The points up to some one give read_s, the others row_s for each of some parts of read_s as start_s.
    """
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
    """Return the two regimes of one expert: its weights are read, or its rows count."""
    return fit_rate(profile.expert_s)
