"""Tools and reasoning through the official client, against a real HTTP server in front of a fake service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from serving.ingress.body_bounds import MAX_SCHEMA_DEPTH, MAX_SCHEMA_VALUES, MAX_TOOLS
from tests.serving.ingress.conftest import FakeService

HERMES = """{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% if m.tool_calls is defined %}{% for call in m.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% endif %}{% if m.tool_call_id is defined %}({{ m.tool_call_id }}){% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if reasoning_effort is defined %}[{{ reasoning_effort }}]{% endif %}{% endif %}"""
THINKS = HERMES + ("{% if enable_thinking is not defined or enable_thinking %}<think>\n{% else %}<think></think>"
                   "{% endif %}")
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 👩‍👩‍👧", "days": 2}}\n</tool_call>'
ARGUMENTS = {"city": "Zürich 👩‍👩‍👧", "days": 2}
TOOL: dict[str, Any] = {"type": "function", "function": {
    "name": "weather", "description": "Tells it.", "parameters": {"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}}}}}
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def template() -> str:
    return HERMES


def prompt_of(service: FakeService) -> str:
    return service.tokenizer.decode(service.requests[-1].prompt_token_ids, skip_special_tokens=False)


@pytest.fixture
async def ask(client: openai.AsyncOpenAI) -> Callable[..., Any]:
    async def ask(**fields: Any) -> Any:
        return await client.chat.completions.create(**({"model": "tiny", "messages": MESSAGES} | fields))
    return ask


async def test_a_call_and_its_answer_go_around(ask: Callable[..., Any], service: FakeService) -> None:
    service.says = f"I look.\n{CALL}\n{CALL}"
    answer = await ask(tools=[TOOL])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    calls = choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [("weather", ARGUMENTS)] * 2
    assert len({call.id for call in calls}) == 2 and all(call.id.startswith("call_") for call in calls)
    assert '<tools>{"type": "function", "function": {"name": "weather", "description"' in prompt_of(service)
    service.says = "Sunny."
    again = await ask(tools=[TOOL], messages=[*MESSAGES, choice.message, {
        "role": "tool", "tool_call_id": calls[0].id, "content": "sun"}])
    assert again.choices[0].message.content == "Sunny." and again.choices[0].message.tool_calls is None
    assert again.choices[0].finish_reason == "stop"
    assert f"I look.{CALL}{CALL}<|im_end|>\n<|im_start|>tool\nsun({calls[0].id})" in prompt_of(service)


async def test_calls_without_content_say_null(ask: Callable[..., Any], service: FakeService) -> None:
    service.says = CALL
    answer = await ask(tools=[TOOL], messages=[*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "type": "function", "index": 0, "function": {"name": "clock", "arguments": ""}}]}])
    assert answer.choices[0].message.content is None
    assert '"name": "clock", "arguments": {}' in prompt_of(service)


@pytest.mark.parametrize("extra", [{}, {"stream_options": {"include_usage": True}}, {"logprobs": True},
                                   {"extra_body": {"return_token_ids": True}}])
async def test_a_streamed_call_is_the_whole_one(ask: Callable[..., Any], service: FakeService,
                                                extra: dict[str, Any]) -> None:
    service.says = f"I look.\n\n{CALL}\n{CALL} Done."
    calls: dict[int, list[str]] = {}
    content, finish, num_pieces = "", None, 0
    async for chunk in await ask(tools=[TOOL], stream=True, **extra):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or ():
                if call.id is not None:
                    assert call.index == len(calls) and call.type == "function"
                    calls[call.index] = [call.function.name, ""]
                num_pieces += 1
                calls[call.index][1] += call.function.arguments
    assert [(name, json.loads(text)) for name, text in calls.values()] == [("weather", ARGUMENTS)] * 2
    assert (content, finish) == ("I look. Done.", "tool_calls") and num_pieces > 20


async def test_the_clients_stream_helper_and_the_sync_client(client: openai.AsyncOpenAI, service: FakeService,
                                                             base_url: str) -> None:
    service.says = CALL
    async with client.chat.completions.stream(model="tiny", messages=MESSAGES, tools=[TOOL]) as stream:    # type: ignore
        final = await stream.get_final_completion()
    assert json.loads(final.choices[0].message.tool_calls[0].function.arguments) == ARGUMENTS      # type: ignore

    def ask_sync() -> tuple[str, str]:
        with openai.OpenAI(base_url=base_url, api_key="any", max_retries=0) as sync:
            answer = sync.chat.completions.create(model="tiny", messages=MESSAGES, tools=[TOOL])       # type: ignore
            stream = sync.chat.completions.create(model="tiny", messages=MESSAGES, tools=[TOOL], stream=True)  # type: ignore
            pieces = [call.function.arguments for chunk in stream for choice in chunk.choices
                      for call in choice.delta.tool_calls or ()]
            return answer.choices[0].message.tool_calls[0].function.arguments, "".join(pieces)
    assert [json.loads(text) for text in await asyncio.to_thread(ask_sync)] == [ARGUMENTS] * 2


async def test_one_call_where_parallel_ones_are_not_wanted(ask: Callable[..., Any], service: FakeService) -> None:
    service.says = CALL * 2
    answer = await ask(tools=[TOOL], parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls) == 1


async def test_none_leaves_tools_out(ask: Callable[..., Any], service: FakeService) -> None:
    service.says = CALL
    answer = await ask(tools=[TOOL], tool_choice="none")
    assert answer.choices[0].message.content == CALL and answer.choices[0].finish_reason == "stop"
    assert "<tools>" not in prompt_of(service)


@pytest.mark.parametrize(("choice", "tools", "start", "says"), [
    ("required", [TOOL, OTHER], '<tool_call>\n{"name":', CALL.removeprefix('<tool_call>\n{"name":')),
    ("required", [TOOL], '<tool_call>\n{"name": "weather", "arguments":', ' {"city": "Zürich 👩‍👩‍👧", "days": 2}}'),
    ({"type": "function", "function": {"name": "weather"}}, [TOOL, OTHER],
     '<tool_call>\n{"name": "weather", "arguments":', ' {"city": "Zürich 👩‍👩‍👧", "days": 2}}\n</tool_call>')])
async def test_a_call_that_must_be_made_is_begun(ask: Callable[..., Any], service: FakeService, choice: object,
                                                 tools: list[object], start: str, says: str) -> None:
    service.says = says
    answer = await ask(tools=tools, tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)
    assert answer.choices[0].finish_reason == "tool_calls" and prompt_of(service).endswith("assistant\n" + start)
    names = [call.function.name async for chunk in await ask(tools=tools, tool_choice=choice, stream=True)
             for call in chunk.choices[0].delta.tool_calls or () if call.id]
    assert names == ["weather"]


async def test_what_is_cut_off_is_length(ask: Callable[..., Any], service: FakeService) -> None:
    service.says = CALL
    answer = await ask(tools=[TOOL], max_tokens=40)
    assert answer.choices[0].finish_reason == "length"


DEEP: Any = {"type": "object"}
for _ in range(MAX_SCHEMA_DEPTH):
    DEEP = {"items": DEEP}


def called(**changes: object) -> dict[str, object]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}} | changes
    return {"messages": [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]}]}


def tool(**function: object) -> dict[str, object]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | function}]}


@pytest.mark.parametrize(("change", "param"), [
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"), ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "x": 1}]}, "tools[0].x"),
    (tool(name="a b"), "tools[0].function.name"), (tool(colour=1), "tools[0].function.colour"),
    (tool(strict="yes"), "tools[0].function.strict"), ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
    (tool(parameters=DEEP), "tools[0].function.parameters"),
    (tool(parameters={"enum": [["a"] * 1000] * 5}), "tools[0].function.parameters"),
    ({"tools": [TOOL] * (MAX_TOOLS + 1)}, "tools"),
    ({"tools": [OTHER | {"function": {"name": f"f{n}", "description": "x" * 60_000}} for n in range(5)]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"), ({"tool_choice": "often", "tools": [TOOL]}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}, "tools": [TOOL]}, "tool_choice"),
    ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, "tool_choice"),
    ({"tool_choice": "required", "tools": [TOOL], "add_generation_prompt": False}, "tool_choice"),
    (called(function={"name": "f", "arguments": "{"}), "messages[1].tool_calls[0].function.arguments"),
    (called(function={"name": "f", "arguments": "[1]"}), "messages[1].tool_calls[0].function.arguments"),
    (called(function={"name": "f", "arguments": "[" * 70_000}), "messages"),
    (called(type="custom"), "messages[1].tool_calls[0].type"), (called(colour=1), "messages[1].tool_calls[0].colour"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]},
     "messages[0].tool_calls"),
    ({"messages": [{"role": "tool", "content": None}]}, "messages[0].content"),
    ({"reasoning_effort": "huge"}, "reasoning_effort")])
async def test_refusals_name_the_field(http: httpx.AsyncClient, service: FakeService, change: dict[str, object],
                                       param: str) -> None:
    response = await http.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES} | change)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500 and service.requests == []


async def test_a_schema_of_the_largest_size_passes(http: httpx.AsyncClient) -> None:
    entries = {f"p{n}": {"type": "string"} for n in range(1000)}
    body = {"messages": MESSAGES, **tool(parameters={"properties": entries})}
    assert len(entries) * 2 < MAX_SCHEMA_VALUES
    assert (await http.post("/tokenize", json=body)).status_code == 200


async def test_tokenize_counts_tools(http: httpx.AsyncClient) -> None:
    counts = [(await http.post("/tokenize", json={"messages": MESSAGES, "tools": tools})).json()["count"]
              for tools in ([], [TOOL])]
    assert counts[1] > counts[0] + 50


@pytest.mark.parametrize("template", [HERMES.replace("{%- if tools %}", "{% if tools %}{{ raise_exception('no') }}")])
async def test_a_template_that_refuses_tools_is_the_clients_error(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "tools": [TOOL]})
    assert response.status_code == 400 and "refuses" in response.json()["error"]["message"]


@pytest.mark.parametrize("template", ["{{ tools }}{{ messages[0].content }}"])
async def test_an_unknown_format_of_calls_is_told(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "tools": [TOOL]})
    assert response.status_code == 400 and "router.tool_parser" in response.json()["error"]["message"]


@pytest.mark.parametrize("template", [HERMES + "{# [TOOL_CALLS] #}"])
async def test_ids_that_mistrals_templates_take(ask: Callable[..., Any], service: FakeService) -> None:
    service.says = '[TOOL_CALLS] [{"name": "weather", "arguments": {}}]'
    (call,) = (await ask(tools=[TOOL])).choices[0].message.tool_calls
    assert len(call.id) == 9 and call.id.isalnum()


@pytest.mark.parametrize("template", [THINKS])
async def test_reasoning_is_split_off(ask: Callable[..., Any], service: FakeService) -> None:
    service.says = f"I muse 👩‍👩‍👧.\n</think>\n\nYes.\n{CALL}"
    answer = await ask(tools=[TOOL])
    message, usage = answer.choices[0].message, answer.usage
    assert message.reasoning_content == message.reasoning == "I muse 👩‍👩‍👧." and message.content == "Yes."
    num_reasoning = len(service.tokenizer.encode("I muse 👩‍👩‍👧.\n</think>", False))
    assert abs(usage.completion_tokens_details.reasoning_tokens - num_reasoning) <= 1
    reasoning = content = ""
    last = None
    async for chunk in await ask(stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            content += choice.delta.content or ""
        last = chunk.usage
    assert (reasoning, content) == ("I muse 👩‍👩‍👧.", f"Yes.\n{CALL}")
    assert last is not None and last.completion_tokens_details.reasoning_tokens == \
        usage.completion_tokens_details.reasoning_tokens
    assert [request.reasoning.num_tokens for request in service.requests] == \
        2 * [usage.completion_tokens_details.reasoning_tokens]      # for the bill


@pytest.mark.parametrize("template", [THINKS])
async def test_reasoning_can_be_left_out_or_switched_off(ask: Callable[..., Any], service: FakeService) -> None:
    service.says = "hm</think>Yes."
    hidden = (await ask(extra_body={"include_reasoning": False})).choices[0].message
    assert hidden.content == "Yes." and not hasattr(hidden, "reasoning")
    service.says = "Yes."
    for off in ({"reasoning_effort": "none"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}):
        answer = await ask(**off)
        assert answer.choices[0].message.content == "Yes." and prompt_of(service).endswith("<think></think>")
        assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    await ask(reasoning_effort="high")
    assert prompt_of(service).endswith("[high]<think>\n")


@pytest.mark.parametrize("template", [THINKS])
async def test_a_call_that_must_be_made_ends_the_thinking(ask: Callable[..., Any], service: FakeService) -> None:
    service.says = " {}}"
    answer = await ask(tools=[TOOL], tool_choice="required")
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"
    assert "<think>\n\n</think>\n\n<tool_call>" in prompt_of(service)
