"""The book is right: a request is opened once and ended once, whoever dies, and budgets hold over all routers."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sqlalchemy import Engine, RowMapping, select

from serving.tenants.database import reading
from serving.tenants.key import Key, Limits
from serving.tenants.ledger import LEASE_S, NOTHING_USED, Ending, Ledger, Opening, Outcome, Used
from serving.tenants.schema import REQUESTS, STANDINGS
from serving.tenants.standing import Ask, Grant
from tests.serving.tenants.keys import new_key

NOW = 1.8e9
USED = Used(num_prompt=10, num_cached=4, num_generated=20, num_reasoning=5, first_token_s=NOW + 1)


def opening(key: Key, usage_id: str, num_tokens: int = 50, now_s: float = NOW) -> Opening:
    return Opening(usage_id, f"req-{usage_id}", key, "m", Ask(num_tokens, num_tokens, num_tokens), now_s)


def ending(key: Key, usage_id: str, used: Used = USED, outcome: Outcome = Outcome.FINISHED) -> Ending:
    return Ending(usage_id, key.key_id, outcome, used, NOW + 2)


def rows(engine: Engine) -> dict[str, RowMapping]:
    with reading(engine) as connection:
        return {row["usage_id"]: row for row in connection.execute(select(REQUESTS)).mappings()}


def standing(engine: Engine, key: Key) -> RowMapping:
    with reading(engine) as connection:
        return connection.execute(select(STANDINGS).where(STANDINGS.c.key_id == key.key_id)).mappings().one()


def test_a_request_is_written_before_and_ended_once(engine: Engine) -> None:
    ledger, (key, _) = Ledger(engine, "r1"), new_key(limits=Limits(tokens_per_day=60))
    (opened,) = ledger.write([opening(key, "a")], [])
    assert opened.decision == Grant(50, 50) and rows(engine)["a"]["outcome"] is None
    (other,) = ledger.write([opening(key, "b")], [])
    assert not isinstance(other.decision, Grant) and list(rows(engine)) == ["a"]
    for _ in range(3):      # whoever does not know whether it was written writes it again
        ledger.write([], [ending(key, "a"), ending(key, "never")])
    ledger.write([], [ending(key, "a", NOTHING_USED, Outcome.CANCELLED)])
    row = rows(engine)["a"]
    assert (row["outcome"], row["num_prompt"], row["num_cached"], row["num_generated"], row["num_reasoning"]) == (
        "finished", 10, 4, 20, 5)
    assert (row["tenant"], row["key_id"], row["model"], row["arrived_s"], row["first_token_s"], row["ended_s"]) == (
        "team", key.key_id, "m", NOW, NOW + 1, NOW + 2)
    assert (standing(engine, key)["day_tokens"], standing(engine, key)["num_open"]) == (30, 0)


def test_a_budget_holds_over_several_routers(engine: Engine) -> None:
    """Four at once spend one budget in single transactions, and end some of what they opened."""
    (key, _), budget = new_key(limits=Limits(tokens_per_day=1000)), 1000

    def spend(number: int) -> int:
        ledger, draw, num_used = Ledger(engine, f"r{number}"), random.Random(number), 0
        for turn in range(12):
            usage_id, size = f"{number}-{turn}", draw.randint(5, 60)
            (opened,) = ledger.write([opening(key, usage_id, size)], [])
            if isinstance(opened.decision, Grant):
                used = draw.randint(0, size)
                ledger.write([], [ending(key, usage_id, Used(num_generated=used))])
                num_used += used
            assert opened.standing.day_tokens <= budget
        return num_used
    with ThreadPoolExecutor(4) as pool:
        num_used = sum(pool.map(spend, range(4)))
    found = standing(engine, key)
    assert found["day_tokens"] == num_used <= budget and found["num_open"] == 0
    assert sum(row["num_generated"] for row in rows(engine).values()) == num_used


def test_what_was_open_at_a_router_that_is_gone_is_ended_as_far_as_it_came(engine: Engine) -> None:
    gone, living, (key, _) = Ledger(engine, "gone"), Ledger(engine, "living"), new_key()
    gone.beat(NOW, [])
    gone.write([opening(key, "a"), opening(key, "b")], [])
    gone.beat(NOW + 1, [("a", USED)])
    living.write([opening(key, "c")], [])
    living.beat(NOW + LEASE_S, [])
    assert living.end_lost(NOW + LEASE_S) == 0
    later_s = NOW + LEASE_S + 2
    living.beat(later_s, [])
    assert (living.end_lost(later_s), living.end_lost(later_s)) == (2, 0)
    assert {usage_id: row["outcome"] for usage_id, row in rows(engine).items()} == {
        "a": "lost", "b": "lost", "c": None}
    assert rows(engine)["a"]["num_generated"] == 20
    assert (standing(engine, key)["day_tokens"], standing(engine, key)["num_open"]) == (30 + 50, 1)
    # It was only cut off: what it says in the end counts, once.
    for _ in range(2):
        gone.write([], [ending(key, "a", replace(USED, num_generated=25))])
    assert rows(engine)["a"]["outcome"] == "finished"
    assert (standing(engine, key)["day_tokens"], standing(engine, key)["num_open"]) == (35 + 50, 1)
