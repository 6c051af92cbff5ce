"""The check whether a profile can be one of a device. Pure, and without SciPy."""

from __future__ import annotations

import math
from collections.abc import Iterator

from model.curve import Curve
from serving.link.epoch import DeviceProfile

_CURVES = ("expert_s", "dense_s", "head_s")
_SPEED, _TIME = "a speed is finite and above zero", "a time is finite and not below zero"


def profile_fault(profile: DeviceProfile) -> str | None:
    """Name the first figure that no device has, its value, and the rule that it breaks. None: there is no such figure.

    'attention_s is nan; a time is finite and not below zero'
    """
    return next(_faults(profile), None)


def _faults(profile: DeviceProfile) -> Iterator[str]:
    for name in _CURVES:
        yield from _curve_faults(name, getattr(profile, name))
    link = profile.link
    speeds = [("read_bytes_per_s", profile.read_bytes_per_s),
              *(("gemm_flop_per_s", flops) for _, flops in profile.gemm_flop_per_s),
              *([("link.bytes_per_s", link.bytes_per_s)] if link else []),
              *([("emulated_speed", profile.emulated_speed)] if profile.emulated_speed is not None else [])]
    times = [("attention_s", profile.attention_s), ("layer_overhead_s", profile.layer_overhead_s),
             *([("link.latency_s", link.latency_s)] if link else [])]
    for name, speed in speeds:
        if not 0 < speed < math.inf:
            yield f"{name} is {speed}; {_SPEED}"
    for name, seconds in times:
        if not 0 <= seconds < math.inf:
            yield f"{name} is {seconds}; {_TIME}"
    if not 0 <= profile.spread < math.inf:
        yield f"spread is {profile.spread}; a difference is finite and not below zero"


def _curve_faults(name: str, curve: Curve) -> Iterator[str]:
    if not curve:
        yield f"{name} is empty; it needs the time of one row at least"
        return
    rows, seconds = [point[0] for point in curve], [point[1] for point in curve]
    if rows != sorted(set(rows)) or rows[0] < 1:
        yield f"{name} is for rows {rows}; rows ascend from 1 on"
    for num_rows, one_s in curve:
        if not 0 < one_s < math.inf:
            yield f"{name} of {num_rows} rows is {one_s}; a time is finite and above zero"
    if seconds != sorted(seconds):
        yield f"{name} is {seconds} seconds; more rows take no less"
