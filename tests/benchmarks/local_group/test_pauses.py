"""Gaps between messages, by hand."""

from __future__ import annotations

from benchmarks.local_group.pauses import (
    distribution_ms,
    gaps_between,
    longest_gaps,
    median_step,
    num_tokens_between,
)
from benchmarks.local_group.streams import Arrival

ARRIVALS = [Arrival(0.0, "a", 1, 0), Arrival(0.5, "b", 1, 0), Arrival(1.0, "a", 2, 1), Arrival(1.5, "b", 1, 1),
            Arrival(2.0, "a", 1, 3), Arrival(5.0, "a", 1, 4), Arrival(5.5, "b", 1, 2)]


def test_a_gap_counts_where_it_overlaps() -> None:
    assert [(gap.request_id, gap.began_s, gap.seconds, gap.num_tokens) for gap in gaps_between(ARRIVALS, 1.2, 1.4)] == [
        ("b", 0.5, 1.0, 1), ("a", 1.0, 1.0, 3)]


def test_the_longest_gap_of_each_stream_is_found() -> None:
    longest = longest_gaps(ARRIVALS, 0.0, 6.0)
    assert {name: gap.seconds for name, gap in longest.items()} == {"a": 3.0, "b": 4.0}


def test_steps_and_tokens_are_those_of_the_time_asked_for() -> None:
    assert median_step(ARRIVALS, 0.2, 1.9) == 1.0
    assert num_tokens_between(ARRIVALS, 0.5, 2.0) == 4
    assert median_step([], 0.0, 1.0) == 0.0


def test_quantiles_are_of_what_is_there() -> None:
    assert distribution_ms([0.003, 0.001, 0.002]) == {"num": 3, "p50": 2.0, "p90": 3.0, "p99": 3.0, "max": 3.0}
    assert distribution_ms([]) == {"num": 0}
