"""Arrivals are counted over windows with enough of them, a rise is seen, peaks are kept for a while."""

from __future__ import annotations

import pytest

from cluster.autoscaler.demand import Demand, DemandHistory, observe
from cluster.autoscaler.fleet import Work


def arrived(num: int) -> Work:
    return Work(num_held=1, num_arrived=num, num_prompt_tokens=num * 100, num_output_tokens=num * 10)


def after(counts: list[int], keep_alive_s: float = 100.0) -> tuple[DemandHistory, Demand]:
    """Observe so many requests in all, one number each second; the window is 4 s, a replica takes 2 s."""
    history, demand = DemandHistory(), Demand()
    for second, num in enumerate(counts):
        history, demand = observe(history, arrived(num), float(second), 4.0, 2.0, keep_alive_s)
    return history, demand


def test_the_first_observation_knows_no_rate() -> None:
    assert after([1_000_000])[1].prompt_tokens_per_s == 0.0


def test_a_steady_stream_has_its_rate() -> None:
    demand = after([10 * second for second in range(20)])[1]
    assert demand.prompt_tokens_per_s == pytest.approx(1000) and demand.output_tokens_per_s == pytest.approx(100)


def test_few_requests_are_counted_over_longer() -> None:
    """One at a time is no rate of its window."""
    demand = after([second // 8 for second in range(33)])[1]
    assert demand.prompt_tokens_per_s == pytest.approx(100 / 8, rel=0.2)


def test_what_rises_is_taken_as_it_will_be() -> None:
    rising = after([0, 0, 0, 0, 0, 10, 40, 90, 160])[1]
    assert rising.prompt_tokens_per_s > 1.2 * 160 * 100 / 4


def test_the_memory_of_arrivals_is_bounded() -> None:
    history, at_s = DemandHistory(), 0.0
    for num in range(5000):
        history, _ = observe(history, arrived(num), at_s, 4.0, 2.0, 50.0)
        at_s += 0.05
    assert len(history.arrivals) < 80 and len(history.peaks) < 20


def test_peaks_fade_after_the_time_to_keep_alive() -> None:
    history, _ = observe(DemandHistory(), Work(num_decoding=9), 0.0, 4.0, 2.0, 16.0)
    for second in range(1, 17):
        history, _ = observe(history, Work(num_decoding=2), float(second), 4.0, 2.0, 16.0)
        assert history.peak().num_decoding == 9
    history, _ = observe(history, Work(num_decoding=2), 17.0, 4.0, 2.0, 16.0)
    assert history.peak().num_decoding == 2


def test_it_is_idle_since_the_last_request() -> None:
    history, _ = observe(DemandHistory(), Work(), 5.0, 4.0, 2.0, 16.0)
    assert history.idle_since_s == 5.0
    history, _ = observe(history, Work(num_arrived=1), 6.0, 4.0, 2.0, 16.0)      # came and went in between
    assert history.idle_since_s is None
