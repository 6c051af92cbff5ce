"""Rates of the last seconds."""

from __future__ import annotations

import pytest

from serving.ingress.http.ui.request_rates import WINDOW_S, RequestRates, RequestWindow, Totals, quantile

BOUNDS_S = (0.1, 0.2, 0.4)


def test_a_quantile_lies_within_its_bucket() -> None:
    assert quantile(BOUNDS_S, [0, 0, 0, 0], 0.5) is None
    assert quantile(BOUNDS_S, [10, 0, 0, 0], 0.5) == pytest.approx(0.05)
    assert quantile(BOUNDS_S, [1, 2, 1, 0], 0.5) == pytest.approx(0.15)
    assert quantile(BOUNDS_S, [1, 2, 1, 0], 0.95) == pytest.approx(0.36)
    assert quantile(BOUNDS_S, [0, 0, 0, 4], 0.5) == 0.4
    assert quantile(BOUNDS_S, [1, 0, 1, 0], 0.5) == pytest.approx(0.1)


def test_only_the_last_seconds_count() -> None:
    window = RequestWindow(BOUNDS_S, BOUNDS_S)
    assert window.add(Totals(100.0, 50, (5, 0, 0, 0), (45, 0, 0, 0))) == RequestRates()
    rates = window.add(Totals(104.0, 90, (5, 2, 0, 0), (45, 0, 38, 0)))
    assert rates.tokens_per_s == 10.0
    assert rates.ttft_p50_s == pytest.approx(0.15) and rates.itl_p50_s == pytest.approx(0.3)
    later = window.add(Totals(104.0 + WINDOW_S, 90, (5, 2, 0, 0), (45, 0, 38, 0)))
    assert later == RequestRates()
    assert window.add(Totals(1000.0, 500, (9, 9, 9, 9), (99, 99, 99, 99))) == RequestRates()
