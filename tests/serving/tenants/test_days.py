"""Days and months begin when those of UTC do."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from serving.tenants.days import DAY_S, day_of, day_of_text, month_of, month_start_s, text_of_day


def test_days_and_months_begin_at_midnight() -> None:
    midnight = datetime(2026, 12, 1, tzinfo=UTC).timestamp()
    assert day_of(midnight) == day_of(midnight - 1) + 1 and day_of(DAY_S) == 1
    assert month_of(midnight) == month_of(midnight - 1) + 1
    assert month_start_s(month_of(midnight)) == midnight
    assert month_start_s(month_of(midnight) + 1) == midnight + 31 * DAY_S


def test_days_are_written_and_read() -> None:
    assert text_of_day(0) == "1970-01-01" and text_of_day(day_of_text("2026-11-28")) == "2026-11-28"
    with pytest.raises(ValueError):
        day_of_text("28.11.2026")
