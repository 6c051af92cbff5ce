"""How much a key has used of its limits: what a new request may have, and what its end changes. Pure.

Budgets (tokens of a day and a month, requests at a time) are exact: a request reserves all that it may use when it is
admitted, and its end gives back what it did not. Rates count what a request is expected to use, and at its end what it
did.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from serving.tenants.days import DAY_S, day_of, month_of, month_start_s
from serving.tenants.key import Limits
from serving.tenants.minute_window import MinuteWindow, slot_of

BUSY_RETRY_S = 1.0      # until one of the requests of a key may have ended


@dataclass(frozen=True, slots=True)
class Standing:
    requests: MinuteWindow = MinuteWindow()
    tokens: MinuteWindow = MinuteWindow()
    day: int = 0                # number since 1970, of UTC
    day_tokens: int = 0         # used or reserved
    month: int = 0              # likewise
    month_tokens: int = 0
    num_open: int = 0


@dataclass(frozen=True, slots=True)
class Ask:
    """The tokens of a new request: prompts and answers."""

    num_least: int          # that it must be allowed
    num_most: int           # that it can use
    num_expected: int       # that it probably will

    def __post_init__(self) -> None:
        assert self.num_least <= self.num_expected <= self.num_most


@dataclass(frozen=True, slots=True)
class Grant:
    num_tokens: int         # it may use so many: Ask.num_least to num_most
    num_charged: int        # counted for the rate


@dataclass(frozen=True, slots=True)
class Refusal:
    limit: str              # its name in Limits
    allowed: int
    used: int
    retry_after_s: float | None     # None: it is more than there ever is


@dataclass(frozen=True, slots=True)
class Spent:
    """What the end of a request changes."""

    arrived_s: float
    num_held: int           # counted for the budgets until now
    num_charged: int
    num_used: int
    was_open: bool


def at(standing: Standing, now_s: float) -> Standing:
    """Return the standing as it is then: minutes, days and months go by."""
    day, month = day_of(now_s), month_of(now_s)
    return Standing(
        standing.requests.at(now_s), standing.tokens.at(now_s),
        max(day, standing.day), standing.day_tokens if day <= standing.day else 0,
        max(month, standing.month), standing.month_tokens if month <= standing.month else 0, standing.num_open)


def reserve(standing: Standing, limits: Limits, ask: Ask, now_s: float) -> tuple[Standing, Grant] | Refusal:
    """Return the standing, which must be that of now, with the request in it; or why it must wait."""
    refusal = _over_rates(standing, limits, ask, now_s) or _over_budgets(standing, limits, ask, now_s)
    if refusal is not None:
        return refusal
    rooms = [allowed - used for _, allowed, used, _ in _budgets(standing, limits, now_s)]
    num_tokens = min([ask.num_most, *rooms])
    num_charged = _num_charged(limits, ask)
    return replace(
        standing, requests=standing.requests.add(1), tokens=standing.tokens.add(num_charged),
        day_tokens=standing.day_tokens + num_tokens, month_tokens=standing.month_tokens + num_tokens,
        num_open=standing.num_open + 1), Grant(num_tokens, num_charged)


def settle(standing: Standing, spent: Spent) -> Standing:
    """Return the standing, which must be that of now, with what the request used instead of what it had reserved.

    Days and months that are over since its arrival do not change any more.
    """
    num_more, num_over = spent.num_used - spent.num_held, spent.num_used - spent.num_charged
    tokens = standing.tokens.add(num_over, None if num_over > 0 else slot_of(spent.arrived_s))
    is_of_day, is_of_month = (day_of(spent.arrived_s) == standing.day, month_of(spent.arrived_s) == standing.month)
    return replace(standing, tokens=tokens, day_tokens=standing.day_tokens + num_more * is_of_day,
                   month_tokens=standing.month_tokens + num_more * is_of_month,
                   num_open=standing.num_open - spent.was_open)


def _over_rates(standing: Standing, limits: Limits, ask: Ask, now_s: float) -> Refusal | None:
    rates = (("requests_per_minute", limits.requests_per_minute, standing.requests, 1),
             ("tokens_per_minute", limits.tokens_per_minute, standing.tokens, _num_charged(limits, ask)))
    for name, allowed, window, count in rates:
        if allowed is None:
            continue
        if count > allowed:
            return Refusal(name, allowed, window.total, None)
        if wait_s := window.wait_s(count, allowed, now_s):
            return Refusal(name, allowed, window.total, wait_s)
    return None


def _over_budgets(standing: Standing, limits: Limits, ask: Ask, now_s: float) -> Refusal | None:
    if limits.concurrent_requests is not None and standing.num_open >= limits.concurrent_requests:
        return Refusal("concurrent_requests", limits.concurrent_requests, standing.num_open, BUSY_RETRY_S)
    for name, allowed, used, wait_s in _budgets(standing, limits, now_s):
        if used + ask.num_least > allowed:
            return Refusal(name, allowed, used, wait_s if ask.num_least <= allowed else None)
    return None


def _budgets(standing: Standing, limits: Limits, now_s: float) -> list[tuple[str, int, int, float]]:
    """Return name, allowed and used tokens, and the seconds until it begins again, of each that the key has."""
    found = []
    if limits.tokens_per_day is not None:
        wait_s = (standing.day + 1) * DAY_S - now_s
        found.append(("tokens_per_day", limits.tokens_per_day, standing.day_tokens, wait_s))
    if limits.tokens_per_month is not None:
        wait_s = month_start_s(standing.month + 1) - now_s
        found.append(("tokens_per_month", limits.tokens_per_month, standing.month_tokens, wait_s))
    return found


def _num_charged(limits: Limits, ask: Ask) -> int:
    """Return what counts for the rate: never more than a minute has, if the request's least is not."""
    num_expected = ask.num_expected if limits.tokens_per_minute is None \
        else min(ask.num_expected, limits.tokens_per_minute)
    return max(ask.num_least, num_expected)
