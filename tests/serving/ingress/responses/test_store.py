"""Responses are kept within bounds, and for their owner only; in the database for all routers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.errors import NotFoundError
from serving.ingress.responses.answers import (
    FunctionCallItem,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Response,
)
from serving.ingress.responses.bodies import ContentPart, Item, Reasoning, TextConfig, ToolBody
from serving.ingress.responses.store import Kept, MemoryStore, ResponseStore, SharedStore
from serving.tenants.database import open_database
from serving.tenants.kept_responses import KeptResponses


def said(name: str, text: str) -> Kept:
    response = Response(
        id=name, created_at=1, status="completed", instructions=None, max_output_tokens=None, metadata={},
        model="tiny", parallel_tool_calls=True, previous_response_id=None, reasoning=Reasoning(), store=True,
        temperature=1.0, text=TextConfig(format={"type": "text"}), tool_choice="auto", top_p=1.0, user=None,
        tools=[ToolBody(type="function", name="f", parameters={"type": "object"})],
        output=(MessageItem(id="m", content=(OutputText(text=text),)),
                ReasoningItem(id="r", content=(ReasoningText(text="hm"),)),
                FunctionCallItem(id="f", call_id="c", name="f", arguments="{}")))
    return Kept(response=response, items=(
        Item(role="user", content=text), Item(role="user", content=[ContentPart(type="input_text", text="\0é")])))


async def kept(store: ResponseStore, names: str, owner: str = "a") -> str:
    found = ""
    for name in names:
        try:
            found += (await store.get(owner, name, "id")).response.id
        except NotFoundError:
            continue
    return found


async def test_the_least_used_go_first() -> None:
    store = MemoryStore(max_responses=2)
    for name in "xy":
        await store.keep("a", said(name, "hi"))
    assert await kept(store, "x") == "x"
    await store.keep("a", said("z", "hi"))
    assert await kept(store, "xyz") == "xz"


async def test_long_ones_count_by_their_length() -> None:
    store = MemoryStore(max_characters=12_000)
    for name in "abc":
        await store.keep("a", said(name, "x" * 4000))
    assert await kept(store, "abc") == "bc"
    await store.keep("a", said("d", "x" * 20_000))
    assert await kept(store, "abcd") == ""
    await store.keep("a", said("e", "x"))
    await store.keep("a", said("e", "y"))
    assert await store.get("a", "e", "id") == said("e", "y")


@pytest.fixture(params=["memory", "database"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ResponseStore]:
    if request.param == "memory":
        yield MemoryStore()
        return
    engine = open_database(f"sqlite:///{tmp_path}/tenants.db")
    rows = KeptResponses(engine, lambda: 1.8e9)
    yield SharedStore(rows)
    rows.close()
    engine.dispose()


async def test_nobody_sees_or_forgets_what_is_anothers(store: ResponseStore) -> None:
    await store.keep("a", said("x", "hi"))
    assert await store.get("a", "x", "id") == said("x", "hi")
    assert await kept(store, "x", owner="b") == ""
    with pytest.raises(NotFoundError, match="send the whole conversation"):
        await store.delete("b", "x", "id")
    await store.delete("a", "x", "id")
    assert await kept(store, "x") == ""
