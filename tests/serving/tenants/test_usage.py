"""Usage adds up to what was ended, and a bill to its prices."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from serving.config import PriceConfig
from serving.tenants.days import DAY_S
from serving.tenants.key_store import KeyStore
from serving.tenants.ledger import Ending, Ledger, Opening, Outcome, Used
from serving.tenants.standing import Ask
from serving.tenants.usage import Usage, read_usage
from serving.tenants.usage_by import UsageBy
from tests.serving.tenants.keys import new_key

DAY = 20_785        # 2026-11-28


def test_requests_are_added_up_by_tenant_key_and_day(engine: Engine) -> None:
    ledger = Ledger(engine, "r")
    first, second = new_key("one", "a")[0], new_key("two", "b")[0]
    for key in (first, second):
        KeyStore(engine).add(key)
    for number, (key, day) in enumerate(((first, DAY), (first, DAY + 1), (second, DAY + 1))):
        ledger.write([Opening(str(number), "r", key, "m", Ask(9, 9, 9), day * DAY_S + 5.0)], [])
    ledger.write([], [Ending(str(number), key.key_id, Outcome.FINISHED, Used(5, 2, 4, 1), DAY * DAY_S + 9.0)
                      for number, key in ((0, first), (1, first))])
    assert read_usage(engine, UsageBy.TENANT, (0, DAY + 9)) == [
        Usage("a", "", 2, 0, 10, 4, 8, 2), Usage("b", "", 1, 1, 0, 0, 0, 0)]
    assert {(usage.of, usage.name) for usage in read_usage(engine, UsageBy.KEY, (0, DAY + 9))} == {
        (first.key_id, "one"), (second.key_id, "two")}
    assert [(usage.of, usage.num_requests) for usage in read_usage(engine, UsageBy.DAY, (DAY, DAY + 1))] == [
        ("2026-11-28", 1), ("2026-11-29", 2)]
    assert [usage.of for usage in read_usage(engine, UsageBy.TENANT, (DAY, DAY))] == ["a"]
    assert read_usage(engine, UsageBy.TENANT, (0, 1)) == []
    assert [(usage.of, usage.num_requests) for usage in read_usage(engine, UsageBy.DAY, (0, DAY + 9), "b")] == [
        ("2026-11-29", 1)]
    assert [usage.of for usage in read_usage(engine, UsageBy.KEY, (0, DAY + 9), "a")] == [first.key_id]


def test_a_bill_has_a_price_for_each_class_of_tokens() -> None:
    usage = Usage("a", "", 1, 0, num_prompt=3_000_000, num_cached=1_000_000, num_generated=500_000,
                  num_reasoning=100_000)
    prices = {"prompt": 0.5, "cached": 0.1, "generated": 2.0}
    assert usage.cost(PriceConfig(**prices)) == pytest.approx(1.0 + 0.1 + 1.0)
    assert usage.cost(PriceConfig(**prices, reasoning=1.0)) == pytest.approx(1.0 + 0.1 + 0.8 + 0.1)
