"""What a body of the Messages API cannot say is refused, with the field and what to do."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serving.ingress.conftest import FakeService
from tests.serving.ingress.test_tools import HERMES, MESSAGES

USE = {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "x"}}
TOOL = {"name": "weather", "input_schema": {"type": "object"}}


@pytest.fixture
def template() -> str:
    return HERMES


def turns(*content: object, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(content)}, *MESSAGES]}


async def post(http: httpx.AsyncClient, fields: dict[str, Any]) -> httpx.Response:
    return await http.post("/v1/messages", json={"model": "tiny", "max_tokens": 100, "messages": MESSAGES} | fields)


@pytest.mark.parametrize(("fields", "param"), [
    ({"max_tokens": None}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"), ({"temprature": 1.0}, "temprature"),
    ({"container": "x"}, "container"), ({"messages": []}, "messages"), ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"temperature": 3.0}, "temperature"), ({"messages": [{"role": "clown", "content": "x"}]}, "messages[0].role"),
    (turns({"type": "image", "source": {}}), "messages[0].content[0].source"),
    (turns({"type": "document"}), "messages[0].content[0].type"), (turns(USE), "messages[0].content[0].type"),
    (turns({"type": "text"}), "messages[0].content[0].text"),
    (turns({"type": "tool_result", "content": "x"}), "messages[0].content[0].tool_use_id"),
    (turns({"type": "tool_use", "name": "x"}, role="assistant"), "messages[0].content[0].id"),
    ({"messages": [*MESSAGES, {"role": "assistant", "content": "Hello "}]}, "messages[1]"),
    ({"messages": [*MESSAGES, {"role": "assistant", "content": [USE]}]}, "messages[1]"),
    ({"messages": [*MESSAGES, {"role": "assistant", "content": "x"}], "tools": [TOOL], "tool_choice": {"type": "any"}},
     "tool_choice"),
    ({"tools": [TOOL | {"type": "web_search_20250305"}]}, "tools[0].type"), ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    ({"tools": [{"name": "a b"}]}, "tools[0].name"), ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"), ({"tool_choice": {"type": "all"}}, "tool_choice.type"),
    ({"thinking": {"type": "much"}}, "thinking.type"), ({"thinking": {"type": "enabled", "display": "x"}},
                                                       "thinking.display"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format")])
async def test_what_cannot_be_is_refused_by_name(http: httpx.AsyncClient, service: FakeService,
                                                 fields: dict[str, Any], param: str) -> None:
    response = await post(http, fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param) and ". " in error["message"]
    assert service.requests == []


@pytest.mark.parametrize("fields", [
    {"metadata": {"user_id": "ada"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}},
    {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}], "stream": False},
    {"tools": [TOOL | {"cache_control": {"type": "ephemeral"}, "type": "custom"}], "tool_choice": {"type": "auto"}},
    {"thinking": {"type": "disabled"}, "top_k": 5, "top_p": 0.5}, {"messages": [{"role": "user", "content": ""}]},
    turns({"type": "tool_result", "tool_use_id": "a", "content": "x", "is_error": True}),
    turns(USE | {"input": {"text": "long " * 200, "deep": {"a": [1, {"b": None}]}}}, role="assistant"),
    turns({"type": "redacted_thinking", "data": "xx"}, {"type": "text", "text": "y"}, role="assistant")])
async def test_what_clients_send_beside_it_is_taken(http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    response = await post(http, fields)
    assert response.status_code == 200, response.text


async def test_input_of_tools_may_be_long(http: httpx.AsyncClient) -> None:
    """Longer than other fields: the context bounds it."""
    response = await post(http, turns(USE | {"input": {"file": {"text": "x" * 100_000}}}, role="assistant"))
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
