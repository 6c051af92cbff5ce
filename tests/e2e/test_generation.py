"""Both doors of a real service on three nodes: the same text, whoever asks, and however many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import openai
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from model.kernels.select import select_kernels
from model.step import SamplingSpec, ScheduledRequest
from serving.link.channel_options import DIRECT
from serving.proto import inference_pb2 as pb
from serving.proto.inference_pb2_grpc import InferenceStub
from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import Service, eventually
from tests.e2e.test_operations import shards_of
from tests.oracle.conftest import Engine

pytestmark = pytest.mark.multinode
PROMPT = "The quick brown fox"
CHAT = [{"role": "user", "content": "hello world, how are you?"}]


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def stub(service: Service) -> Iterator[InferenceStub]:
    with grpc.insecure_channel(service.running.grpc_address, options=DIRECT) as channel:
        yield InferenceStub(channel)


def grpc_answer(stub: InferenceStub, request: pb.GenerateRequest) -> tuple[str, list[int]]:
    responses = list(stub.Generate(request, timeout=PATIENCE_S))
    return ("".join(response.text for response in responses),
            [token_id for response in responses for token_id in response.token_ids])


def test_openai_client_chats(client: openai.OpenAI, service: Service) -> None:
    assert [model.id for model in client.models.list()] == [service.model]
    whole = client.chat.completions.create(model=service.model, messages=CHAT, max_tokens=24, seed=3)
    chunks = list(client.chat.completions.create(
        model=service.model, messages=CHAT, max_tokens=24, seed=3, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None and whole.usage is not None and usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 24)
    assert usage.prompt_tokens_details.cached_tokens, "the second found the first's prompt in the prefix cache"


async def test_async_openai_client_completes(service: Service) -> None:
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        done = await client.completions.create(
            model=service.model, prompt=PROMPT, max_tokens=8, n=2, seed=1, logprobs=2)
    assert len(done.choices) == 2 and all(choice.finish_reason == "length" for choice in done.choices)
    assert done.choices[0].logprobs is not None and len(done.choices[0].logprobs.tokens or []) == 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_doors_give_the_same_text(client: openai.OpenAI, stub: InferenceStub, service: Service,
                                       temperature: float) -> None:
    http = client.completions.create(
        model=service.model, prompt=PROMPT, max_tokens=32, seed=11, temperature=temperature)
    sampling = pb.Sampling(max_tokens=32, seed=11, temperature=temperature)
    text, _ = grpc_answer(stub, pb.GenerateRequest(model=service.model, text=PROMPT, sampling=sampling))
    assert http.choices[0].text == text


def test_three_nodes_draw_the_tokens_of_one_process(stub: InferenceStub, service: Service) -> None:
    """Greedy and hot, bit for bit: the same tokens and log-probabilities as the local reference without a group."""
    token_ids = tuple(stub.Tokenize(pb.TokenizeRequest(model=service.model, text=PROMPT)).token_ids)
    engine = Engine(service.checkpoint, torch.bfloat16, select_kernels("cpu", 2))
    for spec in (SamplingSpec(temperature=0.0, num_logprobs=0), SamplingSpec(seed=5, num_logprobs=0)):
        blocks, known, expected = engine.blocks(len(token_ids) + 24), token_ids, []
        for num_computed in (0, *range(len(token_ids), len(token_ids) + 23)):
            (token,) = engine.run(ScheduledRequest("r", known[num_computed:], num_computed, blocks, spec))
            assert token.token_id is not None and token.logprob is not None
            known += (token.token_id,)
            expected.append((token.token_id, token.logprob.logprob))
        responses = stub.Generate(pb.GenerateRequest(
            model=service.model, token_ids=pb.TokenIds(ids=token_ids),
            sampling=pb.Sampling(max_tokens=24, temperature=spec.temperature, seed=spec.seed, logprobs=0,
                                 ignore_eos=True)), timeout=PATIENCE_S)
        assert [(entry.token_id, entry.logprob) for response in responses for entry in response.logprobs] == expected


async def test_32_streams_at_once_give_what_each_gives_alone(service: Service) -> None:
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        async def answer(index: int) -> str:
            stream = await client.completions.create(
                model=service.model, prompt=f"{PROMPT} {index % 5}", max_tokens=8 + index, seed=index, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])
        together = await asyncio.gather(*(answer(index) for index in range(32)))
        alone = [await answer(index) for index in (0, 7, 31)]
    assert alone == [together[0], together[7], together[31]]
    assert eventually(lambda: all(status["num_tokens_computed"] > 0 for _, status in shards_of(service.status())))


def test_grpc_health_and_reflection(service: Service) -> None:
    with grpc.insecure_channel(service.running.grpc_address, options=DIRECT) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="moesaic.v1.Inference"), timeout=PATIENCE_S)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        replies = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=PATIENCE_S)
        names = {entry.name for reply in replies for entry in reply.list_services_response.service}
    assert {"moesaic.v1.Inference", "grpc.health.v1.Health"} <= names
