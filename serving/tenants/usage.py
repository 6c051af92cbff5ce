"""What was used, added up, and what it costs. Reads the database of the routers; calls wait for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import CompoundSelect, Engine, case, func, literal, select, union_all

from serving.config import PriceConfig
from serving.tenants.database import reading
from serving.tenants.days import text_of_day
from serving.tenants.schema import KEYS, REQUESTS, USAGE_DAYS
from serving.tenants.usage_by import UsageBy

_TOKENS = ("num_prompt", "num_cached", "num_generated", "num_reasoning")


@dataclass(frozen=True, slots=True)
class Usage:
    """Requests of one tenant, key or day, and their tokens."""

    of: str                     # a tenant, a key's id, or a day as 2026-11-28, of UTC
    name: str                   # of the key; else ""
    num_requests: int
    num_open: int               # of them: without their tokens, until they have ended
    num_prompt: int
    num_cached: int             # of the prompt
    num_generated: int
    num_reasoning: int          # of the generated

    def cost(self, prices: PriceConfig) -> float:
        """Return the bill, in the currency of the prices."""
        reasoning = prices.generated if prices.reasoning is None else prices.reasoning
        return ((self.num_prompt - self.num_cached) * prices.prompt + self.num_cached * prices.cached
                + (self.num_generated - self.num_reasoning) * prices.generated + self.num_reasoning * reasoning) / 1e6

    def row(self, by: UsageBy, prices: PriceConfig | None) -> dict[str, str | int]:
        """Return it as `moesaic usage` and /usage show it; with prices, also what it costs."""
        row: dict[str, str | int] = {by.value: self.of}
        if by is UsageBy.KEY:
            row["name"] = self.name
        row |= {"requests": self.num_requests, "open": self.num_open, "prompt_tokens": self.num_prompt,
                "cached_tokens": self.num_cached, "generated_tokens": self.num_generated,
                "reasoning_tokens": self.num_reasoning}
        if prices is not None:
            row[f"cost_{prices.currency.lower()}"] = f"{self.cost(prices):.6f}"
        return row


def read_usage(engine: Engine, by: UsageBy, days: tuple[int, int], tenant: str | None = None) -> list[Usage]:
    """Return what arrived from the first to the last of these days, numbers since 1970, UTC; of all tenants or one."""
    rows = _rows().subquery()
    group = {UsageBy.TENANT: rows.c.tenant, UsageBy.KEY: rows.c.key_id, UsageBy.DAY: rows.c.day}[by]
    query = select(group, *(func.sum(rows.c[name]) for name in ("num_requests", "num_open", *_TOKENS))).where(
        rows.c.day.between(*days), *([] if tenant is None else [rows.c.tenant == tenant])
    ).group_by(group).order_by(group)
    with reading(engine) as connection:
        found = connection.execute(query).all()
        names = {row[0]: row[1] for row in connection.execute(select(KEYS.c.key_id, KEYS.c.name))}
    return [Usage(text_of_day(row[0]) if by is UsageBy.DAY else row[0], names.get(row[0], ""),
                  *(int(count) for count in row[1:])) for row in found]


def _rows() -> CompoundSelect[Any]:
    """Return the requests, and the days whose requests were added up. One statement sees each of them once."""
    is_open = REQUESTS.c.outcome.is_(None)
    requests = select(
        REQUESTS.c.day, REQUESTS.c.tenant, REQUESTS.c.key_id, literal(1).label("num_requests"),
        case((is_open, 1), else_=0).label("num_open"),
        *(case((is_open, 0), else_=REQUESTS.c[name]).label(name) for name in _TOKENS))
    days = select(USAGE_DAYS.c.day, USAGE_DAYS.c.tenant, USAGE_DAYS.c.key_id, USAGE_DAYS.c.num_requests,
                  literal(0), *(USAGE_DAYS.c[name] for name in _TOKENS))
    return union_all(requests, days)
