"""How usage is added up, and how it is shown. Pure."""

from __future__ import annotations

import enum

from serving.errors import InvalidRequestError
from serving.tenants.days import day_of, day_of_text


class UsageBy(enum.StrEnum):
    TENANT = "tenant"
    KEY = "key"
    DAY = "day"


class UsageFormat(enum.StrEnum):
    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def days_between(since: str | None, until: str | None, now_s: float) -> tuple[int, int]:
    """Return the first and the last day, both included; all until today where none is said.

    Raises InvalidRequestError.
    """
    days = [0, day_of(now_s)]
    for index, (name, text) in enumerate((("since", since), ("until", until))):
        if text is not None:
            try:
                days[index] = day_of_text(text)
            except ValueError:
                raise InvalidRequestError(f"{text[:80]!r} is not a day", fix="write it as 2026-11-28",
                                          param=name) from None
    return days[0], days[1]
