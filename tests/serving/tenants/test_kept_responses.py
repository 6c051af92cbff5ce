"""Responses in the database: for all routers, for their tenant only, and within bounds of number, size and age."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from serving.errors import NotReadyError
from serving.tenants.kept_responses import KEEP_S, KeptResponses


class Clock:
    now_s = 1.8e9

    def __call__(self) -> float:
        self.now_s += 1
        return self.now_s


async def found(kept: KeptResponses, names: str, tenant: str = "a") -> str:
    return "".join([await kept.get(tenant, name, str) or "-" for name in names])


async def test_any_router_has_what_one_has_kept_and_no_other_tenant(engine: Engine) -> None:
    one, other = KeptResponses(engine, Clock()), KeptResponses(engine, Clock())
    await one.keep("a", "x", lambda: "1")
    await one.keep("b", "x", lambda: "2")
    assert await found(other, "x") + await found(other, "x", "b") + await found(other, "x", "c") == "12-"
    await other.keep("a", "x", lambda: "3")
    assert await found(one, "x") == "3"
    assert [await other.delete("a", "x"), await one.delete("a", "x")] == [True, False]
    assert await found(one, "x") + await found(one, "x", "b") == "-2"
    one.close()
    other.close()


async def test_the_newest_of_each_tenant_stay(engine: Engine) -> None:
    clock = Clock()
    kept = KeptResponses(engine, clock, max_responses=3, max_characters=10)
    await kept.keep("b", "x", lambda: "b")
    for name in "uvwx":
        await kept.keep("a", name, lambda name=name: name)      # type: ignore[misc]
    assert await found(kept, "uvwx") == "-vwx"
    await kept.keep("a", "y", lambda: "yyyyyyyyy")
    assert await found(kept, "vwxy") == "--xyyyyyyyyy" and await found(kept, "x", "b") == "b"
    await kept.keep("a", "z", lambda: "z" * 11)
    assert await found(kept, "xyz") == "---"
    clock.now_s += KEEP_S
    assert await found(kept, "x", "b") == "-"
    kept.close()


async def test_a_database_that_is_away_is_told(engine: Engine) -> None:
    kept = KeptResponses(engine, Clock())
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE responses")
    with pytest.raises(NotReadyError, match="try again soon"):
        await kept.get("a", "x", str)
    kept.close()
