"""The headers of OpenAI's API say what is left of a minute."""

from __future__ import annotations

from serving.tenants.key import Limits
from serving.tenants.minute_window import MinuteWindow
from serving.tenants.rate_headers import EXPOSED, rate_headers
from serving.tenants.standing import Standing


def test_only_limits_that_there_are_have_headers() -> None:
    standing = Standing(requests=MinuteWindow().at(900.0).add(3), tokens=MinuteWindow().at(900.0).add(500))
    assert rate_headers(standing, Limits(), 910.0) == {}
    found = rate_headers(standing, Limits(requests_per_minute=10, tokens_per_minute=400), 910.0)
    assert set(found) == set(EXPOSED)
    assert (found["x-ratelimit-limit-requests"], found["x-ratelimit-remaining-requests"]) == ("10", "7")
    assert (found["x-ratelimit-remaining-tokens"], found["x-ratelimit-reset-tokens"]) == ("0", "53.000s")
    assert rate_headers(standing, Limits(requests_per_minute=10), 990.0)["x-ratelimit-remaining-requests"] == "10"
