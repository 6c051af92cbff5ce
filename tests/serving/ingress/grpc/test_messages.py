"""Tools and formats over gRPC: the same as over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.ingress.grpc.server import build_grpc_server
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc
from serving.text.tokenizer import Tokenizer
from tests.deadlines import PATIENCE_S
from tests.serving.ingress.conftest import FakeService
from tests.serving.ingress.test_structured_output import SCHEMA, accepts
from tests.serving.ingress.test_tools import ARGUMENTS, CALL, HERMES, THINKS, TOOL, prompt_of

WEATHER = pb.Function(name="weather", description="Tells it.", parameters=json.dumps(TOOL["function"]["parameters"]))
HI = pb.ChatMessage(role="user", content="hi")
STRICT = pb.Function(name="weather", parameters=json.dumps(SCHEMA), strict=True)


@pytest.fixture
def template() -> str:
    return HERMES


@pytest.fixture
async def stub(service: FakeService) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    server = build_grpc_server(service, service.tokenizer)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield inference_pb2_grpc.InferenceStub(channel)
    await server.stop(grace=None)


async def ask(stub: inference_pb2_grpc.InferenceStub, request: pb.GenerateRequest | None = None, **fields: object
              ) -> list[pb.GenerateResponse]:
    return [response async for response in stub.Generate(request or pb.GenerateRequest(**fields), timeout=PATIENCE_S)]


async def test_a_call_and_its_answer_go_around(stub: inference_pb2_grpc.InferenceStub, service: FakeService) -> None:
    service.says = f"I look.\n{CALL}"
    responses = await ask(stub, chat=pb.Chat(messages=[HI], tools=[WEATHER]))
    assert "".join(response.text for response in responses) == "I look."
    (first, *rest) = [call for response in responses for call in response.tool_calls]
    assert first.name == "weather" and first.id and len(rest) > 3
    arguments = "".join(call.arguments for call in rest)
    assert json.loads(arguments) == ARGUMENTS and responses[-1].finish_reason == "tool_calls"
    said = pb.ChatMessage(role="assistant", content="I look.", tool_calls=[
        pb.ToolCall(id=first.id, name="weather", arguments=arguments)])
    service.says = "Sunny."
    await ask(stub, chat=pb.Chat(tools=[WEATHER], messages=[HI, said, pb.ChatMessage(
        role="tool", content="sun", tool_call_id=first.id)]))
    assert f"I look.{CALL}<|im_end|>\n<|im_start|>tool\nsun({first.id})" in prompt_of(service)
    tokenized = await stub.Tokenize(pb.TokenizeRequest(chat=pb.Chat(messages=[HI], tools=[WEATHER])))
    assert tuple(tokenized.token_ids) == service.requests[0].prompt_token_ids


@pytest.mark.parametrize("fields", [{"tool_choice": "required"}, {"called_function": "weather"}])
async def test_a_call_that_must_be_made_is_begun_and_held_to_its_schema(
        stub: inference_pb2_grpc.InferenceStub, service: FakeService, fields: dict[str, str]) -> None:
    await ask(stub, chat=pb.Chat(messages=[HI], tools=[STRICT], **fields))
    assert prompt_of(service).endswith('"arguments":') and accepts(service, ' {"a": 1}}\n</tool_call>')


@pytest.mark.parametrize("template", [THINKS])
async def test_reasoning_is_told_apart(stub: inference_pb2_grpc.InferenceStub, service: FakeService) -> None:
    service.says = "I wonder.</think>\n\nYes."
    responses = await ask(stub, chat=pb.Chat(messages=[HI]))
    assert "".join(response.reasoning for response in responses) == "I wonder."
    assert "".join(response.text for response in responses) == "Yes."
    assert 0 < responses[-1].usage.reasoning_tokens < responses[-1].usage.completion_tokens


@pytest.mark.parametrize(("form", "good", "bad"), [
    (pb.Format(json_schema=json.dumps(SCHEMA)), '{"a": 3}', "{}"), (pb.Format(json_object=True), "{}", "1"),
    (pb.Format(regex="[ab]"), "a", "c"), (pb.Format(choice=pb.Choices(texts=["yes", "no"])), "no", "maybe"),
    (pb.Format(grammar='start: "x"'), "x", "y")])
async def test_formats(stub: inference_pb2_grpc.InferenceStub, service: FakeService, form: pb.Format, good: str,
                       bad: str) -> None:
    for prompt in ({"text": "hi"}, {"chat": pb.Chat(messages=[HI])}):
        await ask(stub, format=form, **prompt)
        assert accepts(service, good) and not accepts(service, bad)


@pytest.mark.parametrize(("fields", "param"), [
    ({"text": "x", "format": pb.Format(regex="(")}, "format"),
    ({"chat": pb.Chat(messages=[HI], tools=[WEATHER, WEATHER])}, "tools[1].name"),
    ({"chat": pb.Chat(messages=[HI], tools=[pb.Function(name="x", parameters="[")])}, "tools[0].parameters"),
    ({"chat": pb.Chat(messages=[HI], tool_choice="all")}, "tool_choice"),
    ({"chat": pb.Chat(messages=[pb.ChatMessage(role="tool")])}, "chat.messages[0].tool_call_id"),
    ({"chat": pb.Chat(messages=[pb.ChatMessage(role="user", tool_calls=[pb.ToolCall()])])},
     "chat.messages[0].tool_calls"),
    ({"chat": pb.Chat(messages=[pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(arguments="{,")])])},
     "chat.messages[0].tool_calls[0].arguments")])
async def test_refusals_name_the_field(stub: inference_pb2_grpc.InferenceStub, fields: dict[str, object],
                                       param: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(stub, **fields)
    trailing = dict(refused.value.trailing_metadata() or ())
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT and trailing["error-param"] == param
    assert trailing["error-code"] and ". " in str(refused.value.details())


def of_kind(field: FieldDescriptor) -> st.SearchStrategy[object]:
    """Return values of one field, mostly small, some absurd."""
    if field.message_type is not None:
        return messages(field.message_type)
    return {FieldDescriptor.CPPTYPE_STRING: st.sampled_from(["", "hi", "tool", "user", "{}", "[", "\U0001f469" * 3]),
            FieldDescriptor.CPPTYPE_BOOL: st.booleans(), FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
            FieldDescriptor.CPPTYPE_UINT32: st.sampled_from([0, 1, 2, 511, 2**32 - 1]),
            FieldDescriptor.CPPTYPE_INT32: st.sampled_from([0, -1, -100, 101, -2**31]),
            FieldDescriptor.CPPTYPE_INT64: st.sampled_from([0, -1, 2**63 - 1]),
            FieldDescriptor.CPPTYPE_ENUM: st.just(0)}[field.cpp_type]


def messages(kind: Descriptor) -> st.SearchStrategy[dict[str, object]]:
    """Return the fields of messages of a kind."""
    def values(field: FieldDescriptor) -> st.SearchStrategy[object]:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            return st.dictionaries(of_kind(entry["key"]), of_kind(entry["value"]), max_size=2)
        return st.lists(of_kind(field), max_size=2) if field.is_repeated else of_kind(field)
    known = [field for field in kind.fields if field.message_type is None or field.message_type.name != "Struct"]
    return st.fixed_dictionaries({}, optional={field.name: values(field) for field in known})


class Fuzzed:
    """A door, and the event loop that it is served in."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._runner = asyncio.Runner()
        self._runner.run(self._open(tokenizer))

    async def _open(self, tokenizer: Tokenizer) -> None:
        self._server = build_grpc_server(FakeService(tokenizer), tokenizer)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def ask(self, request: pb.GenerateRequest) -> None:
        """Raise what is no client's error."""
        async def ask_whole() -> None:
            try:
                await ask(self._stub, request)
            except grpc.aio.AioRpcError as error:
                allowed = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
                assert error.code() in allowed, (request, error)
        self._runner.run(ask_whole())

    def close(self) -> None:
        async def close() -> None:
            await self._channel.close()
            await self._server.stop(grace=None)
        self._runner.run(close())
        self._runner.close()


@pytest.fixture(scope="module")
def fuzzed(byte_level_dir: Path) -> Iterator[Fuzzed]:
    made = Fuzzed(Tokenizer.from_dir(byte_level_dir))
    yield made
    made.close()


@settings(max_examples=150, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(messages(pb.GenerateRequest.DESCRIPTOR))
def test_no_message_is_a_fault_or_waits_for_ever(fuzzed: Fuzzed, fields: dict[str, object]) -> None:
    fuzzed.ask(pb.GenerateRequest(**fields | {"model": "tiny"}))
