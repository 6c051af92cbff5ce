"""The Responses API through the official client, sync and async, over a real HTTP server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from serving.errors import ShardFailedError
from tests.serving.ingress.conftest import ANSWER, FakeService
from tests.serving.ingress.test_tools import ARGUMENTS, CALL, HERMES, THINKS, TOOL, prompt_of

WEATHER: Any = {"type": "function"} | TOOL["function"]
COLD: dict[str, Any] = {"model": "tiny", "input": "hi", "temperature": 0}
ITEM_KINDS = ["response.output_item.added", "response.content_part.added", "response.output_text.delta",
              "response.output_text.done", "response.content_part.done", "response.output_item.done"]
CALL_KINDS = ["response.output_item.added", "response.function_call_arguments.delta",
              "response.function_call_arguments.done", "response.output_item.done"]


@pytest.fixture
def template() -> str:
    return HERMES


async def test_a_response(client: openai.AsyncOpenAI, service: FakeService) -> None:
    response = await client.responses.create(**COLD, instructions="Be brief.", metadata={"a": "b"})
    assert response.output_text == f"0{ANSWER}" and response.status == "completed" and response.error is None
    assert (response.temperature, response.metadata, response.object) == (0, {"a": "b"}, "response")
    assert response.usage is not None and response.usage.input_tokens_details.cached_tokens == 3
    assert response.usage.input_tokens == len(service.requests[-1].prompt_token_ids)
    assert prompt_of(service).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi")


async def test_what_is_cut_off_is_incomplete(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(**COLD, max_output_tokens=3)
    assert response.status == "incomplete" and response.output[0].status == "incomplete"        # type: ignore
    assert response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"


async def test_events_come_in_the_published_order(client: openai.AsyncOpenAI, service: FakeService) -> None:
    service.says = f"I look.\n{CALL}\n{CALL}"
    events: list[Any] = [event async for event in await client.responses.create(**COLD, tools=[WEATHER], stream=True)]
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == [
        "response.created", "response.in_progress", *ITEM_KINDS, *CALL_KINDS[1:3], "response.completed"]
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1].response
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == last.output_text == "I look."
    calls = [item for item in last.output if item.type == "function_call"]
    assert [json.loads(call.arguments) for call in calls] == [ARGUMENTS] * 2 and calls[0].call_id != calls[1].call_id


async def test_a_call_goes_around_by_the_id_of_the_response(client: openai.AsyncOpenAI, service: FakeService) -> None:
    service.says = f"I look.\n{CALL}"
    first = await client.responses.create(**COLD, tools=[WEATHER], instructions="Be brief.")
    (call,) = (item for item in first.output if item.type == "function_call")
    service.says = "Sunny."
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    second = await client.responses.create(**COLD | {"input": [output]}, tools=[WEATHER], previous_response_id=first.id)
    wanted = ("user\nhi<|im_end|>\n<|im_start|>assistant\n"
              f"I look.{CALL}<|im_end|>\n<|im_start|>tool\nsun({call.call_id})")
    assert second.output_text == "Sunny." and wanted in prompt_of(service) and "Be brief." not in prompt_of(service)
    assert second.previous_response_id == first.id
    await client.responses.create(**COLD | {"input": [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}, *first.output, output]}, tools=[WEATHER])
    assert wanted in prompt_of(service)         # the same, given back by the client


async def test_the_stream_helper_and_the_sync_client(client: openai.AsyncOpenAI, base_url: str,
                                                     service: FakeService) -> None:
    service.says = CALL
    async with client.responses.stream(**COLD, tools=[WEATHER]) as stream:
        final: Any = await stream.get_final_response()

    def ask_sync() -> list[Any]:
        with openai.OpenAI(base_url=base_url, api_key="any", max_retries=0) as sync:
            *_, last = sync.responses.create(**COLD, tools=[WEATHER], stream=True)
            return [sync.responses.create(**COLD, tools=[WEATHER]), last.response]              # type: ignore
    for made in [final, *await asyncio.to_thread(ask_sync)]:
        assert json.loads(made.output[0].arguments) == ARGUMENTS


@pytest.mark.parametrize("template", [THINKS])
async def test_reasoning_is_an_item(client: openai.AsyncOpenAI, service: FakeService) -> None:
    service.says = "I wonder.</think>\n\nYes."
    response: Any = await client.responses.create(**COLD, reasoning={"effort": "low"}, include=[
        "reasoning.encrypted_content"])
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "I wonder." and response.output_text == "Yes."
    assert response.usage.output_tokens_details.reasoning_tokens > 0 and prompt_of(service).endswith("[low]<think>\n")
    kinds = [event.type async for event in await client.responses.create(**COLD, stream=True)]
    assert kinds.index("response.reasoning_text.delta") < kinds.index("response.reasoning_text.done") < kinds.index(
        "response.output_text.delta")
    service.says = "Yes."
    await client.responses.create(**COLD, reasoning={"effort": "none"}, previous_response_id=response.id)
    assert prompt_of(service).endswith("<think></think>")


async def test_text_of_a_schema(client: openai.AsyncOpenAI, service: FakeService) -> None:
    service.says = '{"a": 1}'
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    response = await client.responses.create(**COLD, text={"format": {
        "type": "json_schema", "name": "x", "schema": schema, "strict": True}})
    assert json.loads(response.output_text) == {"a": 1} and service.requests[-1].params.grammar
    assert response.text is not None and response.text.format is not None


async def test_what_was_kept_can_be_had_and_forgotten(client: openai.AsyncOpenAI) -> None:
    kept, other = [await client.responses.create(**COLD, store=store) for store in (True, False)]
    assert (await client.responses.retrieve(kept.id)).output_text == kept.output_text
    await client.responses.delete(kept.id)
    for response in (kept, other):
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)


async def test_a_failure_in_a_stream_is_an_event(client: openai.AsyncOpenAI, service: FakeService) -> None:
    service.error = ShardFailedError("gone", fix="again")
    with pytest.raises(openai.InternalServerError):
        await client.responses.create(**COLD, stream=True)
    service.num_before_error = 3
    *_, last = [event async for event in await client.responses.create(**COLD, stream=True)]
    assert last.type == "response.failed" and last.response.error is not None
    assert last.response.status == "failed" and last.response.error.message == "gone. again"


@pytest.mark.parametrize(("fields", "param"), [
    ({"input": None}, "input"), ({"inputs": "x"}, "inputs"), ({"background": True}, "background"),
    ({"previous_response_id": "resp_none"}, "previous_response_id"), ({"include": ["x"]}, "include"),
    ({"input": [{"role": "clown", "content": "x"}]}, "input[0].role"), ({"input": [{"content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"), ({"input": [{"role": "user"}]},
                                                                      "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "name": "x", "call_id": "y", "arguments": "["}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"), ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
    ({"tool_choice": {"type": "file_search"}}, "tool_choice"), ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"), ({"text": {"format": {"type": "xml"}}},
                                                              "text.format"),
    ({"truncation": "auto"}, "truncation"), ({"metadata": {"a": 1}}, "metadata.a")])
async def test_what_cannot_be_is_refused_by_name(http: httpx.AsyncClient, service: FakeService,
                                                 fields: dict[str, Any], param: str) -> None:
    response = await http.post("/v1/responses", json=COLD | fields)
    error = response.json()["error"]
    assert response.status_code == (404 if param == "previous_response_id" else 400), error
    assert error["param"] == param and error["code"] and ". " in error["message"] and service.requests == []
