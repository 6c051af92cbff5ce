"""No minute has more than its limit, and room comes when it is said to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.tenants.minute_window import NUM_SLOTS, SLOT_S, MinuteWindow, slot_of

LIMIT = 100
ARRIVALS = st.lists(st.tuples(st.floats(0, 20), st.integers(1, LIMIT)), max_size=60)


@given(ARRIVALS)
def test_no_minute_has_more_than_the_limit(arrivals: list[tuple[float, int]]) -> None:
    window, now_s, taken = MinuteWindow(), 1000.0, []
    for gap_s, count in arrivals:
        now_s += gap_s
        window = window.at(now_s)
        if window.wait_s(count, LIMIT, now_s) == 0:
            window = window.add(count)
            taken.append((now_s, count))
    for end_s, _ in taken:
        assert sum(count for at_s, count in taken if end_s - 60 < at_s <= end_s) <= LIMIT


@given(ARRIVALS, st.integers(1, LIMIT))
def test_after_the_wait_there_is_room_and_not_before(arrivals: list[tuple[float, int]], count: int) -> None:
    window, now_s = MinuteWindow(), 1000.0
    for gap_s, arrived in arrivals:
        now_s += gap_s
        window = window.at(now_s)
        window = window.add(arrived if window.total + arrived <= LIMIT else 0)
    wait_s = window.wait_s(count, LIMIT, now_s)
    assert 0 <= wait_s <= NUM_SLOTS * SLOT_S
    assert window.at(now_s + wait_s + 1e-6).total + count <= LIMIT
    assert wait_s == 0 or window.at(now_s + wait_s - 1e-3).total + count > LIMIT


def test_a_steady_stream_gets_95_percent_and_more() -> None:
    window, num_taken, num_minutes = MinuteWindow(), 0, 30
    for tick in range(num_minutes * 600):
        now_s = 1000.0 + tick / 10
        window = window.at(now_s)
        if window.wait_s(1, LIMIT, now_s) == 0:
            window, num_taken = window.add(1), num_taken + 1
    assert 0.95 * LIMIT * num_minutes <= num_taken <= LIMIT * (num_minutes + 1)


def test_counts_go_to_their_slot_and_a_clock_that_goes_back_changes_nothing() -> None:
    window = MinuteWindow().at(1000.0).add(5).at(1030.0).add(2, slot_of(1000.0))
    assert window.total == 7 and window.at(900.0) == window and window.add(9, slot_of(900.0)) == window
    assert window.at(1064.0).total == 0 and window.reset_s(1030.0) == (slot_of(1000.0) + NUM_SLOTS) * SLOT_S - 1030.0
