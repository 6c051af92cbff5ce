"""A real service refuses requests that it cannot serve, and stays whole when clients leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest

from serving.link.channel_options import DIRECT
from serving.proto import inference_pb2 as pb
from serving.proto.inference_pb2_grpc import InferenceStub
from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import MAX_OPEN_REQUESTS, MAX_QUEUED_REQUESTS, Service, eventually
from tests.e2e.tiny_model import MAX_CONTEXT

pytestmark = pytest.mark.multinode
LONG = {"model": "tiny", "prompt": "hello", "max_tokens": MAX_CONTEXT - 40, "ignore_eos": True, "temperature": 0}


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=service.url, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
async def stub(service: Service) -> AsyncIterator[InferenceStub]:
    async with grpc.aio.insecure_channel(service.running.grpc_address, options=DIRECT) as channel:
        yield InferenceStub(channel)


@pytest.mark.parametrize(("content", "status", "says"), [
    (b'{"model": "tiny", "prompt": ', 400, "JSON"),
    (b'[1, 2]', 400, ""),
    (b'{"model": "tiny", "prompt": "a", "max_tokens": "many"}', 400, "max_tokens"),
    (b'{"model": "tiny", "prompt": "a", "temperature": 3}', 400, "temperature"),
    (b'{"model": "tiny", "prompt": "a", "best_of": 4}', 400, "best_of"),
    (b'{"model": "tiny", "prompt": "a", "no_such_field": 1}', 400, "no_such_field"),
    (b'{"model": "other", "prompt": "a"}', 404, "other"),
    (b'{"model": "tiny", "prompt": [1, 2, 99999]}', 400, "99999")])
async def test_wrong_requests_are_refused_by_name(http: httpx.AsyncClient, content: bytes, status: int,
                                                  says: str) -> None:
    answer = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert says in error["message"] and error["type"]


async def test_a_prompt_beyond_the_context_is_refused(http: httpx.AsyncClient, stub: InferenceStub) -> None:
    too_long = [5] * (MAX_CONTEXT + 1)
    answer = await http.post("/v1/completions", json={"model": "tiny", "prompt": too_long, "max_tokens": 1})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await anext(aiter(stub.Generate(pb.GenerateRequest(model="tiny", token_ids=pb.TokenIds(ids=too_long)),
                                        timeout=PATIENCE_S)))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_cancelled_stream_frees_its_blocks(service: Service, http: httpx.AsyncClient,
                                                   stub: InferenceStub) -> None:
    async with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        await anext(aiter(response.aiter_lines()))
    call = stub.Generate(pb.GenerateRequest(model="tiny", text="hello", sampling=pb.Sampling(
        max_tokens=LONG["max_tokens"], ignore_eos=True)))
    await anext(aiter(call))
    call.cancel()
    assert await asyncio.to_thread(eventually, service.is_empty)


async def test_a_client_that_hangs_up_frees_its_blocks(service: Service) -> None:
    """Without a goodbye: the sockets just close."""
    async with httpx.AsyncClient(base_url=service.url, timeout=PATIENCE_S) as leaving:
        asking = [asyncio.create_task(leaving.post("/v1/completions", json=LONG)) for _ in range(4)]
        assert await asyncio.to_thread(eventually, lambda: service.metric("num_requests_open") == 4)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    assert await asyncio.to_thread(eventually, service.is_empty)


async def test_over_the_limit_both_doors_say_when_to_come_back(service: Service, http: httpx.AsyncClient,
                                                               stub: InferenceStub) -> None:
    async with contextlib.AsyncExitStack() as stack:
        full = {**LONG, "n": MAX_OPEN_REQUESTS, "stream": True}
        response = await stack.enter_async_context(http.stream("POST", "/v1/completions", json=full))
        lines = response.aiter_lines()      # kept: the stream closes when its iterator is dropped
        await anext(lines)
        queued = [asyncio.create_task(http.post("/v1/completions", json={**LONG, "max_tokens": 1}))
                  for _ in range(MAX_QUEUED_REQUESTS)]
        assert await asyncio.to_thread(
            eventually, lambda: service.metric("num_requests_queued") == MAX_QUEUED_REQUESTS)
        refused = await http.post("/v1/completions", json=LONG)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1, refused.text
        with pytest.raises(grpc.aio.AioRpcError) as over:
            await anext(aiter(stub.Generate(pb.GenerateRequest(model="tiny", text="a"), timeout=PATIENCE_S)))
        assert over.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    answers = await asyncio.gather(*queued)         # the stream above is closed, so they come to their turn
    assert [answer.status_code for answer in answers] == [200] * MAX_QUEUED_REQUESTS
    assert await asyncio.to_thread(eventually, service.is_empty)
