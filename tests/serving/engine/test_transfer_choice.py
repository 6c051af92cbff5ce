"""What is done sooner is chosen, and what is not known is tried."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serving.engine.transfer_choice import HALF_LIFE_TOKENS, PrefillRate, Transfer, is_sent

# 10 MB at 100 MB/s: 0.1 s; 1,000 tokens at 8,000/s: 0.125 s.
TRANSFER = Transfer(num_bytes=10_000_000, num_bytes_before=0, num_tokens=1000, num_tokens_before=0, num_sending=1,
                    bytes_per_s=100e6, tokens_per_s=8000.0)


@pytest.mark.parametrize(("change", "sent"), [
    ({}, True), ({"bytes_per_s": 50e6}, False), ({"tokens_per_s": 11_000.0}, False),
    ({"num_bytes_before": 3_000_000}, False), ({"num_sending": 2}, False),
    ({"num_bytes_before": 3_000_000, "num_tokens_before": 100}, True),      # others' prefill takes its time either way
    ({"num_tokens": 700}, False), ({"num_tokens": 0}, False),
    ({"bytes_per_s": None}, True), ({"tokens_per_s": None}, True), ({"bytes_per_s": None, "num_tokens": 0}, False)])
def test_what_is_done_sooner_is_chosen(change: dict[str, float], sent: bool) -> None:
    assert is_sent(replace(TRANSFER, **change)) is sent     # type: ignore[arg-type]


def test_a_prefill_rate_is_that_of_the_steps_that_compute_most() -> None:
    rate = PrefillRate()
    assert rate.tokens_per_s is None
    for _ in range(4):
        rate.add(256, 0.1)
    assert rate.tokens_per_s == pytest.approx(2560)
    for _ in range(20):
        rate.add(3, 0.08)       # what others decode takes as long
    assert rate.tokens_per_s == pytest.approx(2560, rel=0.06)


def test_a_prefill_rate_follows_what_changes() -> None:
    rate = PrefillRate()
    rate.add(1000, 0.1)
    for _ in range(8):
        rate.add(HALF_LIFE_TOKENS // 4, 1.024)
    assert rate.tokens_per_s == pytest.approx(1000, rel=0.15)
