"""The Messages API through Anthropic's official client, sync and async, over a real HTTP server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anthropic
import httpx
import pytest

from serving.config import RouterConfig
from serving.errors import OverloadedError, ShardFailedError
from serving.ingress.http.app import HttpParts, build_http_app
from serving.tenants.key_ring import KeyRing
from tests.serving.ingress.conftest import ANSWER, FakeService
from tests.serving.ingress.test_tools import ARGUMENTS, CALL, HERMES, MESSAGES, THINKS, TOOL, prompt_of
from tests.serving.tenants.keys import new_key

WEATHER: dict[str, Any] = {"name": "weather", "description": "Tells it.",
                           "input_schema": TOOL["function"]["parameters"]}
Ask = Callable[..., Any]


@pytest.fixture
def template() -> str:
    return HERMES


@pytest.fixture
async def claude(base_url: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=base_url.removesuffix("/v1"), api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture
def ask(claude: anthropic.AsyncAnthropic) -> Ask:
    async def ask(**fields: Any) -> Any:
        return await claude.messages.create(**({"model": "tiny", "messages": MESSAGES, "max_tokens": 500,
                                                "extra_body": {"temperature": 0.0}} | fields))
    return ask


async def test_a_message_is_answered(ask: Ask, service: FakeService) -> None:
    message = await ask(system="Be brief.")
    assert [(block.type, block.text) for block in message.content] == [("text", f"0{ANSWER}")]
    assert (message.role, message.model, message.stop_reason, message.stop_sequence) == (
        "assistant", "tiny", "end_turn", None)
    num_prompt = len(service.requests[-1].prompt_token_ids)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (num_prompt - 3, 3)
    assert message.usage.output_tokens > 10 and message.id.startswith("msg_") and message._request_id
    assert prompt_of(service).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi")


async def test_what_ends_it_is_said(ask: Ask) -> None:
    stopped = await ask(stop_sequences=["world"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "world")
    assert stopped.content[0].text.endswith("👩‍👩‍👧 ")
    assert (await ask(max_tokens=3)).stop_reason == "max_tokens"


async def test_events_come_in_the_published_order(ask: Ask) -> None:
    events = [event async for event in await ask(stream=True)]
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"] and set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(event.delta.text for event in events[2:-3]) == f"0{ANSWER}"
    assert events[0].message.content == [] and events[0].message.usage.input_tokens > 0
    assert events[-2].delta.stop_reason == "end_turn" and events[-2].usage.output_tokens > 10


async def test_a_call_goes_around(ask: Ask, service: FakeService) -> None:
    service.says = f"I look.\n{CALL}"
    message = await ask(tools=[WEATHER])
    said, call = message.content
    assert (said.text, call.name, call.input, message.stop_reason) == ("I look.", "weather", ARGUMENTS, "tool_use")
    service.says = "Sunny."
    await ask(tools=[WEATHER], messages=[*MESSAGES, {"role": "assistant", "content": message.content}, {
        "role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": [
            {"type": "text", "text": "sun"}]}, {"type": "text", "text": "And?"}]}])
    assert f"I look.{CALL}<|im_end|>\n<|im_start|>tool\nsun({call.id})<|im_end|>\n<|im_start|>user\nAnd?" in prompt_of(
        service)


async def test_streamed_calls_and_the_sync_client(claude: anthropic.AsyncAnthropic, base_url: str,
                                                  service: FakeService) -> None:
    service.says = f"I look.\n{CALL}\n{CALL} Done."
    whole: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 500, "tools": [WEATHER]}
    async with claude.messages.stream(**whole) as stream:
        message = await stream.get_final_message()

    def ask_sync() -> list[Any]:
        with (anthropic.Anthropic(base_url=base_url.removesuffix("/v1"), api_key="any", max_retries=0) as sync,
              sync.messages.stream(**whole) as events):
            return [sync.messages.create(**whole), events.get_final_message()]
    for made in [message, *await asyncio.to_thread(ask_sync)]:
        assert [block.type for block in made.content] == ["text", "tool_use", "tool_use", "text"]
        assert made.content[1].input == made.content[2].input == ARGUMENTS
        assert made.content[1].id != made.content[2].id and made.stop_reason == "tool_use"


@pytest.mark.parametrize(("choice", "start"), [
    ({"type": "any"}, '"name": "weather", "arguments":'), ({"type": "tool", "name": "weather"}, '"arguments":'),
    ({"type": "auto", "disable_parallel_tool_use": True}, "assistant\n"), ({"type": "none"}, "assistant\n")])
async def test_tool_choice(ask: Ask, service: FakeService, choice: dict[str, Any], start: str) -> None:
    service.says = CALL * 2 if choice["type"] in ("auto", "none") else ' {"city": "x"}}</tool_call>'
    message = await ask(tools=[WEATHER], tool_choice=choice)
    assert prompt_of(service).endswith(start)
    num_calls = sum(block.type == "tool_use" for block in message.content)
    assert num_calls == (0 if choice["type"] == "none" else 1)


@pytest.mark.parametrize("template", [THINKS])
async def test_thinking_is_a_block(ask: Ask, service: FakeService) -> None:
    service.says = "I wonder.</think>\n\nYes."
    thinking = {"type": "enabled", "budget_tokens": 1024}
    message = await ask(thinking=thinking)
    assert [(block.type) for block in message.content] == ["thinking", "text"]
    assert (message.content[0].thinking, message.content[1].text) == ("I wonder.", "Yes.")
    kinds = [(event.type, event.index) for event in [event async for event in await ask(thinking=thinking, stream=True)]
             if "block_st" in event.type]
    assert kinds == [(f"content_block_{kind}", index) for index in (0, 1) for kind in ("start", "stop")]
    shown = await ask(thinking=thinking | {"display": "omitted"})
    assert [block.type for block in shown.content] == ["text"]
    service.says = "Yes."
    assert (await ask(messages=[*MESSAGES, {"role": "assistant", "content": message.content}, *MESSAGES])
            ).content[0].text == "Yes."
    assert prompt_of(service).endswith("<think></think>")


async def test_an_answer_that_is_begun_goes_on(ask: Ask, service: FakeService) -> None:
    service.says = " world"
    message = await ask(messages=[*MESSAGES, {"role": "assistant", "content": "Hello"}])
    assert message.content[0].text == " world" and prompt_of(service).endswith("assistant\nHello")


async def test_tokens_are_counted(claude: anthropic.AsyncAnthropic, ask: Ask, service: FakeService) -> None:
    counted = await claude.messages.count_tokens(model="tiny", messages=MESSAGES, tools=[WEATHER], system="Brief.")
    await ask(tools=[WEATHER], system="Brief.")
    assert counted.input_tokens == len(service.requests[-1].prompt_token_ids)


async def test_an_answer_of_a_schema(ask: Ask, service: FakeService) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    service.says = '{"a": 1}'
    message = await ask(output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"})
    assert json.loads(message.content[0].text) == {"a": 1} and service.requests[-1].params.grammar


@pytest.mark.parametrize(("error", "kind", "told"), [
    (OverloadedError("full", retry_after_s=2), anthropic.RateLimitError, "rate_limit_error"),
    (ShardFailedError("gone"), anthropic.InternalServerError, "overloaded_error"),
    (RuntimeError("ours"), anthropic.InternalServerError, "api_error")])
async def test_errors_have_anthropics_shape(ask: Ask, service: FakeService, error: Exception,
                                            kind: type[anthropic.APIStatusError], told: str) -> None:
    service.error = error
    with pytest.raises(kind) as refused:
        await ask()
    assert refused.value.body["type"] == "error" and refused.value.body["error"]["type"] == told      # type: ignore
    service.num_before_error = 3
    with pytest.raises(anthropic.APIStatusError) as later:
        _ = [event async for event in await ask(stream=True)]
    assert later.value.body["error"]["type"] == told                                                  # type: ignore


async def test_keys_and_paths_answer_in_the_same_shape(service: FakeService, http: httpx.AsyncClient) -> None:
    keys, (key, secret) = KeyRing(time.time), new_key()
    keys.set_keys([key])
    app = build_http_app(service, service.tokenizer, RouterConfig(), lambda: (b"", "text/plain"),
                         parts=HttpParts(keys=keys))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as locked:
        body = {"model": "tiny", "max_tokens": 5, "messages": MESSAGES}
        refused = await locked.post("/v1/messages", json=body)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        assert (await locked.post("/v1/messages", json=body, headers={"x-api-key": secret})).status_code == 200
    gone = await http.get("/v1/messages")
    assert gone.status_code == 405 and gone.json()["type"] == "error" and gone.headers["request-id"]
