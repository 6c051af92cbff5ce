"""Days and months of UTC as numbers: days since 1970, months since the year 0."""

from __future__ import annotations

from datetime import UTC, date, datetime

DAY_S = 86400
_EPOCH = date(1970, 1, 1)


def day_of(unix_s: float) -> int:
    return int(unix_s // DAY_S)


def month_of(unix_s: float) -> int:
    found = datetime.fromtimestamp(unix_s, UTC)
    return found.year * 12 + found.month - 1


def month_start_s(month: int) -> float:
    """Return when it begins, as Unix time."""
    return datetime(month // 12, month % 12 + 1, 1, tzinfo=UTC).timestamp()


def text_of_day(day: int) -> str:
    """Return it as 2026-11-28."""
    return date.fromordinal(_EPOCH.toordinal() + day).isoformat()


def day_of_text(text: str) -> int:
    """Read 2026-11-28. Raises ValueError."""
    return date.fromisoformat(text).toordinal() - _EPOCH.toordinal()
