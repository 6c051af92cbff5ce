"""Tokens a second and latencies of the last seconds, from what a router has counted since it began. Pure."""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts since the router began. Histograms: tokens in each bucket, the last one above all bounds."""

    at_s: float
    num_tokens: int                     # generated
    first_token: tuple[int, ...]
    inter_token: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestRates:
    """Rates of the last WINDOW_S. None: there was none of it."""

    tokens_per_s: float = 0.0
    ttft_p50_s: float | None = None     # time to the first token
    ttft_p95_s: float | None = None
    itl_p50_s: float | None = None      # time between two tokens
    itl_p95_s: float | None = None


class RequestWindow:
    """Keeps the totals of the last WINDOW_S. `first_bounds_s`, `inter_bounds_s`: upper bounds of the buckets."""

    def __init__(self, first_bounds_s: Sequence[float], inter_bounds_s: Sequence[float]) -> None:
        self._first_bounds_s = first_bounds_s
        self._inter_bounds_s = inter_bounds_s
        self._totals: deque[Totals] = deque()

    def add(self, totals: Totals) -> RequestRates:
        """Take up the newest totals, and return the rates up to them."""
        while self._totals and totals.at_s - self._totals[0].at_s > WINDOW_S:
            self._totals.popleft()
        self._totals.append(totals)
        oldest = self._totals[0]
        passed_s = totals.at_s - oldest.at_s
        if passed_s <= 0:
            return RequestRates()
        first = [new - old for new, old in zip(totals.first_token, oldest.first_token, strict=True)]
        inter = [new - old for new, old in zip(totals.inter_token, oldest.inter_token, strict=True)]
        return RequestRates((totals.num_tokens - oldest.num_tokens) / passed_s,
                            quantile(self._first_bounds_s, first, 0.5), quantile(self._first_bounds_s, first, 0.95),
                            quantile(self._inter_bounds_s, inter, 0.5), quantile(self._inter_bounds_s, inter, 0.95))


def quantile(bounds: Sequence[float], counts: Sequence[int], part: float) -> float | None:
    """Return what `part` of the values are at most, by a straight line within a bucket, as Prometheus does; the highest
    bound for what is above all. None without values."""
    total = sum(counts)
    if not total:
        return None
    wanted, so_far = part * total, [0, *itertools.accumulate(counts)]
    bucket = max(bisect.bisect_left(so_far, wanted) - 1, 0)
    if bucket >= len(bounds):
        return bounds[-1]
    low = bounds[bucket - 1] if bucket else 0.0
    return low + (bounds[bucket] - low) * (wanted - so_far[bucket]) / counts[bucket]
