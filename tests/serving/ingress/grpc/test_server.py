"""The gRPC door over a real server and channel, in front of a fake service."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from serving.errors import OverloadedError
from serving.ingress.grpc.server import SERVICE_NAME, build_grpc_server
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc
from serving.tenants.key import Tenant
from serving.tenants.key_ring import KeyRing
from serving.text.tokenizer import Tokenizer
from tests.deadlines import PATIENCE_S
from tests.serving.ingress.conftest import ANSWER, FakeService
from tests.serving.tenants.keys import new_key


@dataclass
class Door:
    channel: grpc.aio.Channel
    stub: inference_pb2_grpc.InferenceStub
    address: str


@pytest.fixture
async def door(request: pytest.FixtureRequest, service: FakeService, tokenizer: Tokenizer) -> AsyncIterator[Door]:
    server = build_grpc_server(service, tokenizer, getattr(request, "param", None))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Door(channel, inference_pb2_grpc.InferenceStub(channel), f"127.0.0.1:{port}")
    await server.stop(grace=None)


def greedy(**sampling: object) -> pb.GenerateRequest:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
    return pb.GenerateRequest(model="tiny", chat=chat, sampling=pb.Sampling(temperature=0, **sampling))


async def refused(door: Door, request: pb.GenerateRequest, **options: object) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in door.stub.Generate(request, timeout=PATIENCE_S, **options):
            pass
    return caught.value


async def test_generate_streams_both_choices_and_ends_with_usage(door: Door, service: FakeService) -> None:
    request = greedy(n=2, logprobs=1, prompt_logprobs=0)
    request.request_id = "mine"
    responses = [response async for response in door.stub.Generate(request)]
    for choice in range(2):
        own = [response for response in responses if response.choice == choice]
        assert "".join(response.text for response in own) == f"{choice}{ANSWER}"
        assert [response.finish_reason for response in own if response.finish_reason] == ["stop"]
        ids = [token_id for response in own for token_id in response.token_ids]
        scored = [entry for response in own for entry in response.logprobs]
        assert [entry.token_id for entry in scored] == ids and all(len(entry.top) == 1 for entry in scored)
        assert len(own[0].prompt_logprobs) == len(service.requests[0].prompt_token_ids) - 1
    assert [response.HasField("usage") for response in responses] == [False] * (len(responses) - 1) + [True]
    assert responses[-1].usage.completion_tokens == sum(len(response.token_ids) for response in responses)
    assert responses[-1].usage.cached_tokens == 3 and {response.request_id for response in responses} == {"mine"}


async def test_a_message_beyond_its_bounds_is_the_clients_error(door: Door) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="a")] * 4097)
    calls = door.stub.Generate(pb.GenerateRequest(chat=chat)).read(), door.stub.Tokenize(pb.TokenizeRequest(chat=chat))
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError, match="messages has more than 4096 values") as refused:
            await call
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert ("error-param", "messages") in tuple(refused.value.trailing_metadata())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_template_variables_that_are_no_json_are_the_clients_error(door: Door, value: float) -> None:
    request = greedy()
    request.chat.chat_template_kwargs.update({"a": [value]})
    error = await refused(door, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "chat_template_kwargs" in str(error.details())


async def test_stop_strings_are_told(door: Door) -> None:
    responses = [response async for response in door.stub.Generate(greedy(stop=["你"]))]
    assert "".join(response.text for response in responses) == "0Hello "
    assert responses[-1].finish_reason == "stop" and responses[-1].stop_string == "你"


async def test_text_and_token_id_prompts(door: Door, service: FakeService, tokenizer: Tokenizer) -> None:
    for request in [pb.GenerateRequest(text="hello"),
                    pb.GenerateRequest(model="tiny", token_ids=pb.TokenIds(ids=tokenizer.encode("hello")))]:
        async for _ in door.stub.Generate(request):
            pass
    first, second = service.requests
    assert first.prompt_token_ids == second.prompt_token_ids and first.params == second.params
    assert first.params.max_tokens == 16 and first.model == "tiny"


async def test_both_doors_build_the_same_request_and_give_the_same_text(
        door: Door, http: httpx.AsyncClient, service: FakeService) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.95, "min_p": 0.05, "seed": 11, "repetition_penalty": 1.1,
                "max_tokens": 40, "presence_penalty": 0.3, "frequency_penalty": -0.1, "top_k": 7, "min_tokens": 1}
    for given in (sampling, {}):
        chat = pb.Chat(messages=[pb.ChatMessage(role="system", content="s"),
                                 pb.ChatMessage(role="user", content="你好")])
        request = pb.GenerateRequest(model="tiny", chat=chat, sampling=pb.Sampling(
            **given, stop=["zz"], logit_bias={5: 0.1}, stop_token_ids=[3]))
        over_grpc = "".join([response.text async for response in door.stub.Generate(request)])
        body = given | {"model": "tiny", "stop_token_ids": [3], "messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": "你好"}],
                        "stop": "zz", "logit_bias": {"5": 0.1}}
        over_http = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]["content"]
        assert over_grpc == over_http
        first, second = service.requests[-2:]
        assert (first.params, first.prompt_token_ids) == (second.params, second.prompt_token_ids)


async def test_models_and_tokenize(door: Door, tokenizer: Tokenizer) -> None:
    models = (await door.stub.ListModels(pb.ListModelsRequest())).models
    assert [(model.name, model.max_model_len) for model in models] == [("tiny", 256)]
    tokenized = await door.stub.Tokenize(pb.TokenizeRequest(model="tiny", text="hello 你好"))
    assert list(tokenized.token_ids) == tokenizer.encode("hello 你好") and tokenized.max_model_len == 256
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
    ids = (await door.stub.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids
    assert tokenizer.decode(ids, False).endswith("<|im_start|>assistant\n")
    for wrong in (pb.TokenizeRequest(), pb.TokenizeRequest(chat=chat, add_special_tokens=True)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await door.stub.Tokenize(wrong)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("request_", "code", "word"), [
    (pb.GenerateRequest(model="tiny"), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    (pb.GenerateRequest(model="other", text="x"), grpc.StatusCode.NOT_FOUND, "other"),
    (greedy(top_p=2.0), grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
    (greedy(max_tokens=10_000), grpc.StatusCode.INVALID_ARGUMENT, "256"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[100_000])), grpc.StatusCode.INVALID_ARGUMENT, "100000"),
    (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="robot")])), grpc.StatusCode.INVALID_ARGUMENT,
     "robot"),
    (pb.GenerateRequest(chat=pb.Chat()), grpc.StatusCode.INVALID_ARGUMENT, "empty")])
async def test_wrong_requests_get_the_tables_code(door: Door, request_: pb.GenerateRequest, code: grpc.StatusCode,
                                                  word: str) -> None:
    error = await refused(door, request_)
    assert error.code() is code and word in str(error.details())


async def test_overload_says_when_to_come_back(door: Door, service: FakeService) -> None:
    service.error = OverloadedError("the queue is full", retry_after_s=2.5)
    error = await refused(door, greedy(), metadata=(("x-request-id", "r1"),))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(error.trailing_metadata()) == {"x-request-id": "r1", "error-code": "rate_limit_exceeded",
                                               "retry-after": "3"}


async def test_unexpected_errors_tell_nothing(door: Door, service: FakeService) -> None:
    service.error, service.num_before_error = RuntimeError("secret"), 2
    error = await refused(door, greedy())
    assert error.code() is grpc.StatusCode.INTERNAL and "secret" not in str(error.details())


KEY, SECRET = new_key()
KEYS = KeyRing(time.time)
KEYS.set_keys([KEY])


@pytest.mark.parametrize("door", [KEYS], indirect=True)
async def test_api_keys_come_in_metadata(door: Door, service: FakeService) -> None:
    assert (await refused(door, greedy())).code() is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(grpc.aio.AioRpcError):
        await door.stub.ListModels(pb.ListModelsRequest())
    metadata = (("authorization", f"Bearer {SECRET}"),)
    assert [response async for response in door.stub.Generate(greedy(), metadata=metadata)]
    assert service.requests[0].tenant == Tenant("team", KEY)


async def test_a_priority_may_be_given(door: Door, service: FakeService) -> None:
    for given in (-3, 0, None):
        request = greedy()
        if given is not None:
            request.priority = given
        assert [response async for response in door.stub.Generate(request)]
        assert service.requests[-1].priority == given


async def test_the_header_of_a_trace_goes_on_to_the_service(door: Door, service: FakeService) -> None:
    for metadata in ((("traceparent", "00-ab-cd-01"),), ()):
        assert [response async for response in door.stub.Generate(greedy(), metadata=metadata)]
        assert service.requests[-1].traceparent == dict(metadata).get("traceparent", "")


async def test_a_cancelled_call_cancels(door: Door, service: FakeService) -> None:
    service.stalls = True
    call = door.stub.Generate(greedy())
    async with asyncio.timeout(PATIENCE_S):
        await call.read()
        call.cancel()
        await service.closed.wait()


async def test_the_clients_deadline_reaches_the_service_and_ends_the_call(door: Door, service: FakeService) -> None:
    service.stalls = True
    deadline_s = 0.5
    while not service.requests:     # on a busy machine the time may be over before the call arrives
        deadline_s *= 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in door.stub.Generate(greedy(), timeout=deadline_s):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(PATIENCE_S):
        await service.closed.wait()
    assert service.requests[0].deadline_s is not None and 0 < service.requests[0].deadline_s <= deadline_s


async def test_reflection_lists_the_services(door: Door) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(door.channel)
    requests = [reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME)]
    answers = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert names >= {SERVICE_NAME, "grpc.health.v1.Health"}
    assert answers[1].file_descriptor_response.file_descriptor_proto


async def test_health_is_served_without_a_key(door: Door, service: FakeService) -> None:
    stub = health_pb2_grpc.HealthStub(door.channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    assert (await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))).status == serving
    service.ready = False
    assert (await stub.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await refused(door, greedy())).code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("door", [KEYS], indirect=True)
async def test_a_client_that_protoc_makes_needs_plain_grpcio_only(door: Door, tmp_path: Path) -> None:
    """As examples/grpc_client.py says: in a process of its own, without a module of ours."""
    root = Path(__file__).parents[4]

    async def run(*arguments: object) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *map(str, arguments), cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
        told, failed = await process.communicate()
        assert process.returncode == 0, failed.decode()
        return told.decode()

    async with asyncio.timeout(300):
        await run("-m", "grpc_tools.protoc", f"-I{root}/serving/proto", "--python_out=.", "--grpc_python_out=.",
                  root / "serving/proto/inference.proto")
        (tmp_path / "client.py").write_text((root / "examples/grpc_client.py").read_text(encoding="utf-8"))
        told = await run("client.py", door.address, "hi", SECRET)
    answer, usage = told.rsplit("\n", 2)[:2]
    assert answer.endswith(ANSWER) and usage.endswith("tokens, stop")
