"""What a measured curve says about any number of rows. Pure.

N values of a number of rows
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from serving.link.epoch import Curve

FloatArray = npt.NDArray[np.float64]


def scaled(curve: Curve, factor: float) -> Curve:
    """Where everything takes so many times as long."""
    return tuple((rows, seconds * factor) for rows, seconds in curve)


def curve_seconds(curve: Curve, num_rows: float) -> float:
    """`seconds_at` one number of rows."""
    return float(seconds_at(curve, np.array([num_rows], dtype=np.float64))[0])


def seconds_at(curve: Curve, rows_N: FloatArray) -> FloatArray:
    """Straight lines between the points, the last slope beyond. Less than one row: that part of one row's time."""
    first, last = curve[0], curve[-1]
    before = curve[-2] if len(curve) > 1 else (0, 0.0)
    slope = max(0.0, (last[1] - before[1]) / (last[0] - before[0]))
    seconds_N = np.interp(rows_N, [point[0] for point in curve], [point[1] for point in curve])
    seconds_N = seconds_N + slope * np.maximum(0.0, rows_N - last[0])
    return np.where(rows_N < 1, np.clip(rows_N, 0, 1) * first[1], seconds_N)
