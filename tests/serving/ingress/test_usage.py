"""Usage over HTTP: the numbers of the command, for those who may know them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from serving.config import PriceConfig, RouterConfig
from serving.ingress.http.app import HttpParts, build_http_app
from serving.ingress.usage import UsageEndpoint
from serving.tenants import usage_reader
from serving.tenants.access import Access
from serving.tenants.days import DAY_S, text_of_day
from serving.tenants.key import Scope
from serving.tenants.key_ring import KeyRing
from serving.tenants.ledger import Ending, Ledger, Opening, Outcome, Used
from serving.tenants.standing import Ask
from serving.tenants.usage import read_usage
from serving.tenants.usage_by import UsageBy
from serving.tenants.usage_reader import MAX_PENDING
from serving.text.tokenizer import Tokenizer
from tests.deadlines import PATIENCE_S
from tests.serving.ingress.conftest import FakeService
from tests.serving.tenants.keys import new_key

DAY = 20_785
PRICES = PriceConfig(prompt=2.0, cached=1.0, generated=4.0, currency="EUR")
SCOPES = {"infer": ("a", Scope.INFER), "own": ("a", Scope.STATUS), "other": ("b", Scope.STATUS),
          "admin": ("ops", Scope.ADMIN)}
Get = Callable[..., Any]


@pytest.fixture
async def access(tmp_path: Path) -> AsyncIterator[Access]:
    """Usage of two tenants: of the first one request on each of two days, of the second one that is open."""
    access = Access(f"sqlite:///{tmp_path}/tenants.db", "r", 90)
    ledger = Ledger(access.engine, "r")
    for number, (tenant, day) in enumerate((("a", DAY), ("a", DAY + 1), ("b", DAY + 1))):
        key, _ = new_key(tenant=tenant)
        ledger.write([Opening(str(number), "r", key, "m", Ask(9, 9, 9), day * DAY_S)], [])
        if tenant == "a":
            ledger.write([], [Ending(str(number), key.key_id, Outcome.FINISHED, Used(5, 2, 4, 1), day * DAY_S)])
    yield access

    async def nothing() -> None:
        pass
    await access.close_after(nothing())


@pytest.fixture
async def get(access: Access, service: FakeService, tokenizer: Tokenizer) -> AsyncIterator[Get]:
    """Asks /usage with the key of that name."""
    keys, made = KeyRing(time.time), {
        name: new_key(tenant=tenant, scopes=frozenset({scope})) for name, (tenant, scope) in SCOPES.items()}
    keys.set_keys([key for key, _ in made.values()])
    usage = UsageEndpoint(access.usage, PRICES, lambda: (DAY + 1) * DAY_S)
    app = build_http_app(service, tokenizer, RouterConfig(), lambda: (b"", "text/plain"),
                         parts=HttpParts(keys=keys, usage=usage))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        yield lambda name, **query: http.get("/usage", params=query,
                                             headers={"authorization": f"Bearer {made[name][1]}"})


async def test_an_admin_sees_what_the_command_shows(get: Get, access: Access) -> None:
    for by in UsageBy:
        report = (await get("admin", by=by)).json()
        assert (report["by"], report["since"], report["until"]) == (by, "1970-01-01", text_of_day(DAY + 1))
        shown = [usage.row(by, PRICES) for usage in read_usage(access.engine, by, (0, DAY + 1))]
        assert report["data"] == shown and len(shown) == {"tenant": 2, "key": 3, "day": 2}[by]
    (row,) = (await get("admin", tenant="a", until=text_of_day(DAY))).json()["data"]
    assert row == {"tenant": "a", "requests": 1, "open": 0, "prompt_tokens": 5, "cached_tokens": 2,
                   "generated_tokens": 4, "reasoning_tokens": 1, "cost_eur": "0.000024"}


async def test_another_key_sees_its_own_tenant_only(get: Get) -> None:
    assert [row["tenant"] for row in (await get("own")).json()["data"]] == ["a"]
    assert [row["requests"] for row in (await get("other", by="day")).json()["data"]] == [1]
    assert (await get("own", tenant="a")).json() == (await get("own")).json()
    refused = await get("own", tenant="b")
    assert refused.status_code == 403
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("insufficient_permissions", "invalid_request_error")
    assert error["param"] == "tenant"
    assert "its own tenant only. leave tenant out" in error["message"]


async def test_a_key_that_only_asks_the_model_sees_nothing(get: Get) -> None:
    refused = await get("infer")
    assert refused.status_code == 403 and "lacks the scope 'status'" in refused.json()["error"]["message"]


@pytest.mark.parametrize(("query", "param"), [
    ({"by": "model"}, "by"), ({"since": "yesterday"}, "since"), ({"until": "2026-02-30"}, "until"),
    ({"bye": "x"}, "bye"), ({"tenant": "x" * 65}, "tenant")])
async def test_a_wrong_question_is_named(get: Get, query: dict[str, str], param: str) -> None:
    refused = await get("admin", **query)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param


async def test_a_database_that_does_not_answer_is_no_fault_of_the_client(get: Get, access: Access) -> None:
    with access.engine.begin() as connection:
        connection.execute(text("DROP TABLE requests"))
    refused = await get("admin")
    assert refused.status_code == 503 and "the database of usage does not answer" in refused.json()["error"]["message"]


async def test_without_keys_nothing_is_counted(http: httpx.AsyncClient) -> None:
    refused = await http.get("/usage")
    assert refused.status_code == 404 and "access.keys" in refused.json()["error"]["message"]


async def test_few_reports_are_made_at_a_time(access: Access, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    """They add up months, one after the other; who may ask may not keep all others waiting."""
    gate = threading.Event()
    monkeypatch.setattr(usage_reader, "read_usage", lambda *_: gate.wait(PATIENCE_S) and [])
    asked = [asyncio.create_task(access.usage.read(UsageBy.DAY, (DAY, DAY), None)) for _ in range(MAX_PENDING)]
    await asyncio.sleep(0)
    try:
        refused = await get("admin", by="day")
    finally:
        gate.set()
    assert refused.status_code == 429 and refused.headers["retry-after"] == "5"
    assert await asyncio.gather(*asked) == [[]] * MAX_PENDING
    assert (await get("admin", by="day")).status_code == 200
