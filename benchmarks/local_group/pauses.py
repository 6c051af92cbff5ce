"""How long streams stood still around a disturbance, from the times at which their messages came."""

from __future__ import annotations

import bisect
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.local_group.streams import Arrival

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Gap:
    """Between two messages of one stream."""

    request_id: str
    began_s: float
    seconds: float
    num_tokens: int             # of the request, before it


def gaps_between(arrivals: Sequence[Arrival], begin_s: float, end_s: float) -> list[Gap]:
    """Return those that overlap the time from begin_s to end_s, of requests that had at least one token."""
    latest: dict[str, Arrival] = {}
    found = []
    for arrival in arrivals[_first_index(arrivals, begin_s - 30.0):]:
        before = latest.get(arrival.request_id)
        if before is not None and arrival.at_s > begin_s and before.at_s < end_s:
            found.append(Gap(arrival.request_id, before.at_s, arrival.at_s - before.at_s, arrival.num_before))
        latest[arrival.request_id] = arrival
    return found


def longest_gaps(arrivals: Sequence[Arrival], begin_s: float, end_s: float) -> dict[str, Gap]:
    """Return the longest of each request."""
    of_request: dict[str, list[Gap]] = defaultdict(list)
    for gap in gaps_between(arrivals, begin_s, end_s):
        of_request[gap.request_id].append(gap)
    return {request_id: max(gaps, key=lambda gap: gap.seconds) for request_id, gaps in of_request.items()}


def median_step(arrivals: Sequence[Arrival], begin_s: float, end_s: float) -> float:
    """Return the median time between two messages of a stream; 0 when there are none."""
    gaps = gaps_between(arrivals, begin_s, end_s)
    return statistics.median(gap.seconds for gap in gaps) if gaps else 0.0


def num_tokens_between(arrivals: Sequence[Arrival], begin_s: float, end_s: float) -> int:
    first, last = _first_index(arrivals, begin_s), _first_index(arrivals, end_s)
    return sum(arrival.num_tokens for arrival in arrivals[first:last])


def distribution_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return how many there are, and their quantiles in milliseconds."""
    ordered = sorted(seconds)
    quantiles = {name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3, 1)
                 for name, share in SHARES.items()} if ordered else {}
    return {"num": len(ordered), **quantiles}


def _first_index(arrivals: Sequence[Arrival], at_s: float) -> int:
    return bisect.bisect_left(arrivals, at_s, key=lambda arrival: arrival.at_s)
