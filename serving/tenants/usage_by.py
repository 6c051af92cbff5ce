"""How usage is added up, and how it is shown. Pure."""

from __future__ import annotations

import enum


class UsageBy(enum.StrEnum):
    TENANT = "tenant"
    KEY = "key"
    DAY = "day"


class UsageFormat(enum.StrEnum):
    TABLE = "table"
    CSV = "csv"
    JSON = "json"
