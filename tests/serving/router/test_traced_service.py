"""One trace of a request, from the router and from the shards that compute it, at a real receiver of OTLP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from serving.config import TracingConfig
from serving.engine.sequence_traces import SequenceTraces
from serving.errors import InvalidRequestError
from serving.router.traced_service import TracedService
from serving.tracing import tracer as tracer_module
from serving.tracing.tracer import Tracer
from tests.deadlines import PATIENCE_S
from tests.serving.link.fake_link import clock
from tests.serving.router.served_shards import Shard, Start, ask, collect, token_ids, truth, until, until_streaming
from tests.serving.tracing.otlp_receiver import Receiver, grpc_receiver

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CLIENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"
ASKED = {"gen_ai.operation.name", "gen_ai.request.model", "gen_ai.request.id", "gen_ai.request.choice.count",
         "gen_ai.request.temperature", "gen_ai.request.top_p", "gen_ai.request.max_tokens", "moesaic.num_prompts"}
GOT = {"gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens", "gen_ai.usage.cache_read.input_tokens",
       "gen_ai.latency.e2e", "gen_ai.latency.time_in_queue", "gen_ai.latency.time_to_first_token",
       "gen_ai.response.finish_reasons", "moesaic.outcome", "moesaic.moves"}


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(tracer_module, "SEND_TIMEOUT_S", PATIENCE_S)
    with grpc_receiver() as receiver:
        yield receiver


@pytest.fixture
async def tracers(receiver: Receiver) -> AsyncIterator[list[Tracer]]:
    """Of a router and two shards."""
    config = TracingConfig(endpoint=receiver.endpoint)
    tracers = [Tracer(config, role, name, clock) for role, name in
               (("router", "r"), ("shard", "s0"), ("shard", "s1"))]
    yield tracers
    for tracer in tracers:
        await tracer.close()


def trace(shards: list[Shard], tracers: list[Tracer]) -> None:
    for shard, tracer in zip(shards, tracers[1:], strict=False):
        shard.engine.traces = SequenceTraces(tracer, clock)


async def until_received(receiver: Receiver, num_spans: int) -> None:
    """Beside the loop, on which the router and the shards send."""
    await asyncio.to_thread(receiver.until, num_spans)


async def test_router_and_shard_tell_one_trace(start: Start, receiver: Receiver, tracers: list[Tracer]) -> None:
    service, shards = await start()
    trace(shards, tracers)
    traced = TracedService(service, tracers[0], clock)
    assert traced.is_ready() and traced.cards == service.cards
    deltas = await collect(traced, replace(ask(), traceparent=CLIENT))
    assert token_ids(deltas) == truth().token_ids
    await until_received(receiver, 5)
    spans = {each.span.name: each for each in receiver.spans}
    whole = spans["llm_request"]
    assert {name: each.service for name, each in spans.items()} == {
        "llm_request": "moesaic-router", "queue": "moesaic-router", "wait": "moesaic-shard",
        "prefill": "moesaic-shard", "decode": "moesaic-shard"}
    assert {each.span.trace_id.hex() for each in receiver.spans} == {TRACE_ID}
    assert whole.span.parent_span_id.hex() == CLIENT.split("-")[2]
    assert {each.span.parent_span_id for name, each in spans.items() if name != "llm_request"} == {whole.span.span_id}
    # These keys and no others: nothing of what was said is among them.
    assert set(whole.attributes) == ASKED | GOT
    assert whole.attributes["gen_ai.usage.input_tokens"] == 20
    assert whole.attributes["gen_ai.usage.output_tokens"] == 12 and whole.attributes["moesaic.moves"] == 0
    assert whole.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert spans["prefill"].attributes["gen_ai.usage.input_tokens"] == 20
    assert spans["decode"].attributes["gen_ai.usage.output_tokens"] == 11


async def test_a_failover_is_told_by_the_router_and_by_who_goes_on(start: Start, receiver: Receiver,
                                                                   tracers: list[Tracer]) -> None:
    service, shards = await start(num_shards=2)
    trace(shards, tracers)
    for shard in shards:
        shard.executor.allow(5)
    traced = TracedService(service, tracers[0], clock)
    task = asyncio.create_task(collect(traced, ask(max_tokens=40)))
    await until_streaming(service, 1)
    (first,) = [shard for shard in shards if shard.num_open]
    (second,) = [shard for shard in shards if shard is not first]
    await until(lambda: first.executor.num_allowed == 0)        # it has decoded
    await first.die()
    second.executor.allow(None)
    assert token_ids(await task) == truth(40).token_ids
    await until_received(receiver, 8)
    (whole,) = [each for each in receiver.spans if each.span.name == "llm_request"]
    assert whole.attributes["moesaic.moves"] == 1 and whole.attributes["moesaic.outcome"] == "finished"
    assert {each.span.trace_id for each in receiver.spans} == {whole.span.trace_id}
    decodes = [each for each in receiver.spans if each.span.name == "decode"]
    assert len({each.instance for each in decodes}) == 2


@pytest.mark.parametrize("is_read", [True, False])
async def test_every_end_is_told(is_read: bool, start: Start, receiver: Receiver, tracers: list[Tracer]) -> None:
    service, _ = await start()
    traced = TracedService(service, tracers[0], clock)
    if is_read:
        with pytest.raises(InvalidRequestError):
            await collect(traced, ask(prompt=()))
    else:
        async with aclosing(traced.generate([ask(max_tokens=500)])) as deltas:
            await anext(deltas)
    await until_received(receiver, 1 if is_read else 2)
    outcomes = [each.attributes["moesaic.outcome"] for each in receiver.spans if each.span.name == "llm_request"]
    assert outcomes == ["InvalidRequestError" if is_read else "cancelled"]
