"""How much of a minute's limits is left, in the headers that OpenAI's API has. Pure."""

from __future__ import annotations

from serving.tenants.key import Limits
from serving.tenants.standing import Standing, at

EXPOSED = tuple(f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset"))


def rate_headers(standing: Standing, limits: Limits, now_s: float) -> dict[str, str]:
    """Return the headers of the limits that there are."""
    headers: dict[str, str] = {}
    now = at(standing, now_s)
    for of, limit, window in (("requests", limits.requests_per_minute, now.requests),
                              ("tokens", limits.tokens_per_minute, now.tokens)):
        if limit is not None:
            headers |= {f"x-ratelimit-limit-{of}": str(limit),
                        f"x-ratelimit-remaining-{of}": str(max(0, limit - window.total)),
                        f"x-ratelimit-reset-{of}": f"{window.reset_s(now_s):.3f}s"}
    return headers
