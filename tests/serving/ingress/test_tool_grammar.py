"""Strict functions: what of a call that must be made is held to the schema."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serving.ingress.conftest import FakeService
from tests.serving.ingress.test_structured_output import accepts
from tests.serving.ingress.test_tools import HERMES, MESSAGES, OTHER

SCHEMA = {"type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"],
          "additionalProperties": False}
STRICT: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}
NAMED = {"type": "function", "function": {"name": "weather"}}
MISTRAL, TAGGED = HERMES + "{# [TOOL_CALLS] #}", HERMES + "{# <function= #}"
CITY: dict[str, Any] = {"type": "function", "function": {"name": "city", "strict": True, "parameters": {
    "type": "object", "required": ["name"], "properties": {
        "name": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "F"]}}}}}


@pytest.fixture
def template() -> str:
    return HERMES


async def post(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES} | fields)


@pytest.mark.parametrize(("template", "choice", "tools", "good", "bad"), [
    (HERMES, NAMED, [STRICT, OTHER], ' {"days": 2}}\n</tool_call>', ' {"days": "2"}}\n</tool_call>'),
    (HERMES, "required", [STRICT], '{"days": 2}}</tool_call>', " {}}</tool_call>"),
    (HERMES, "required", [STRICT, OTHER], ' "clock", "arguments": {"x": 1}}</tool_call>',
     ' "clock", "arguments": 1}</tool_call>'),
    (HERMES, "required", [STRICT, OTHER], ' "weather", "arguments": {"days": 1}}</tool_call>',
     ' "weather", "arguments": {"x": 1}}</tool_call>'),
    (TAGGED, NAMED, [STRICT], "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
     "<parameter=days>\nx\n</parameter>\n</function>\n</tool_call>"),
    (TAGGED, "required", [STRICT, OTHER], "weather>\n<parameter=days>\n2\n</parameter>\n</function></tool_call>",
     "weather>\n</function></tool_call>"),
    (TAGGED, "required", [STRICT, OTHER], "clock>\n<parameter=x>\n{\n</parameter>\n</function></tool_call>",
     "watch>\n</function></tool_call>"),
    (TAGGED, "required", [CITY], "<parameter=name>\nZürich\n<b>\n</parameter>\n<parameter=unit>\nF\n</parameter>\n"
     "</function></tool_call>", "<parameter=name>\nx\n</parameter>\n<parameter=unit>\nK\n</parameter>\n"
     "</function></tool_call>"),
    (TAGGED, "required", [CITY], "<parameter=name>\nx\n</parameter>\n</function></tool_call>",
     "</function></tool_call>"),
    (MISTRAL, NAMED, [STRICT], ' {"days": 2}}]', ' {"days": 2}}</tool_call>')])
async def test_arguments_of_a_strict_call_are_held_to_the_schema(
        http: httpx.AsyncClient, service: FakeService, choice: Any, tools: list[Any], good: str, bad: str) -> None:
    service.says = good
    response = await post(http, tools=tools, tool_choice=choice)
    assert response.status_code == 200, response.text
    assert accepts(service, good) and not accepts(service, bad)
    (call,) = response.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] in ("weather", "clock", "city")


@pytest.mark.parametrize("fields", [{"tools": [STRICT]}, {"tools": [STRICT], "tool_choice": "none"},
                                    {"tools": [OTHER], "tool_choice": "required"}])
async def test_what_need_not_be_called_or_is_not_strict_is_up_to_the_model(
        http: httpx.AsyncClient, service: FakeService, fields: dict[str, Any]) -> None:
    assert (await post(http, **fields)).status_code == 200
    assert not service.requests[-1].params.grammar


@pytest.mark.parametrize(("template", "change", "param"), [
    (TAGGED, {"tools": [{"type": "function", "function": {"name": "weather", "strict": True, "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "pattern": "a"}}}}}]}, "tools"),
    (TAGGED, {"tools": [{"type": "function", "function": {"name": "weather", "strict": True, "parameters": {
        "anyOf": []}}}]}, "tools"), (HERMES, {"ignore_eos": True}, "ignore_eos"),
    (HERMES, {"tools": [{"type": "function", "function": {
        "name": "weather", "parameters": {"type": "nothing"}, "strict": True}}]}, "tools")])
async def test_what_cannot_be_held_is_refused(http: httpx.AsyncClient, service: FakeService, change: dict[str, Any],
                                              param: str) -> None:
    response = await post(http, **({"tools": [STRICT], "tool_choice": NAMED} | change))
    assert response.status_code == 400 and response.json()["error"]["param"] == param and service.requests == []
