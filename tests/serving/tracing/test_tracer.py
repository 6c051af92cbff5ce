"""Spans as real receivers of OTLP get them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import opentelemetry.semconv._incubating.attributes.gen_ai_attributes as conventions
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from serving.config import TracingConfig
from serving.tracing import tracer as tracer_module
from serving.tracing.request_trace import UNTRACED
from serving.tracing.tracer import OpenTrace, Tracer
from tests.ports import held_port
from tests.serving.link.fake_link import clock
from tests.serving.tracing.otlp_receiver import RECEIVERS, Receiver

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNWANTED = CLIENT[:-1] + "0"


def begun(tracer: Tracer, traceparent: str = CLIENT) -> OpenTrace:
    trace = tracer.begin("llm_request", traceparent, {"gen_ai.request.model": "m"})
    assert isinstance(trace, OpenTrace)
    return trace


@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_a_trace_arrives_below_the_clients(protocol: Literal["grpc", "http"],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20secret")
    with RECEIVERS[protocol]() as receiver:
        tracer = Tracer(TracingConfig(endpoint=receiver.endpoint, protocol=protocol), "router", "r1", clock)
        trace = begun(tracer)
        now_s = clock()
        trace.queued(now_s - 2.0, now_s)
        trace.moved("link_broken")
        trace.end("finished", {"gen_ai.usage.output_tokens": 7})
        queue, whole = receiver.until(2)
        await tracer.close()
    assert receiver.headers[0]["authorization"] == "Bearer secret"
    assert {queue.span.trace_id.hex(), whole.span.trace_id.hex()} == {CLIENT.split("-")[1]}
    assert whole.span.parent_span_id.hex() == CLIENT.split("-")[2] and whole.span.kind == Span.SPAN_KIND_SERVER
    assert queue.span.parent_span_id == whole.span.span_id
    assert queue.took_s == pytest.approx(2.0)
    assert (whole.service, whole.instance, whole.span.name) == ("moesaic-router", "r1", "llm_request")
    assert whole.attributes["gen_ai.usage.output_tokens"] == 7 and whole.attributes["moesaic.moves"] == 1
    assert [event.name for event in whole.span.events] == ["moved"]
    assert re.fullmatch(f"00-{CLIENT.split('-')[1]}-{whole.span.span_id.hex()}-0[13]", trace.traceparent)


async def test_an_error_is_its_class(tracer: Tracer, receiver: Receiver) -> None:
    begun(tracer).end("OverloadedError", {})
    (whole,) = receiver.until(1)
    assert whole.span.status.code == Status.STATUS_CODE_ERROR and not whole.span.status.message
    assert whole.attributes["error.type"] == whole.attributes["moesaic.outcome"] == "OverloadedError"


async def test_who_is_not_to_be_traced_is_not(receiver: Receiver) -> None:
    tracer = Tracer(TracingConfig(endpoint=receiver.endpoint, sample_ratio=0.0), "router", "r1", clock)
    assert tracer.begin("llm_request", "", {}) is UNTRACED
    assert tracer.begin("llm_request", "00-what is this", {}) is UNTRACED
    assert tracer.begin("llm_request", UNWANTED, {}) is UNTRACED
    begun(tracer, CLIENT).end("finished", {})       # its client wants it
    assert len(receiver.until(1)) == 1
    await tracer.close()


async def test_a_collector_that_does_not_answer_costs_spans_and_no_time(receiver: Receiver,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracer_module, "MAX_QUEUED_SPANS", 16)
    monkeypatch.setattr(tracer_module, "MAX_SPANS_A_MESSAGE", 8)
    receiver.may_answer.clear()
    tracer = Tracer(TracingConfig(endpoint=receiver.endpoint), "router", "r1", clock)
    for _ in range(1000):       # nobody answers before all of them are made
        begun(tracer).end("finished", {})
    assert not receiver.spans
    receiver.may_answer.set()
    begun(tracer, CLIENT).end("cancelled", {})
    await tracer.close()
    receiver.until_has(lambda spans: any(each.attributes["moesaic.outcome"] == "cancelled" for each in spans))
    assert len(receiver.spans) <= 16 + 8 + 1        # what was queued, and what was on its way


async def test_one_that_is_away_is_no_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracer_module, "SEND_TIMEOUT_S", 0.05)
    nobody = f"http://127.0.0.1:{held_port()}"
    for protocol in ("grpc", "http"):
        tracer = Tracer(TracingConfig(endpoint=nobody, protocol=protocol), "router", "r1", clock)
        for _ in range(10):
            begun(tracer).end("finished", {})
        await tracer.close()


async def test_what_is_queued_is_sent_when_the_process_ends(receiver: Receiver,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracer_module, "SEND_INTERVAL_MS", 1e9)
    tracer = Tracer(TracingConfig(endpoint=receiver.endpoint), "shard", "s1", clock)
    tracer.add("decode", CLIENT, clock() - 1.0, clock(), {})
    await tracer.close()
    (decode,) = receiver.until(1)
    assert (decode.service, decode.span.name) == ("moesaic-shard", "decode")


def test_names_are_those_of_the_conventions_where_they_have_one() -> None:
    known = {value for name, value in vars(conventions).items() if name.startswith("GEN_AI")}
    of_vllm = {"gen_ai.request.id", "gen_ai.latency.e2e", "gen_ai.latency.time_in_queue",
               "gen_ai.latency.time_to_first_token"}
    root = Path(__file__).parents[3] / "serving"
    used = {name for path in ("router/traced_service.py", "engine/sequence_traces.py", "tracing/tracer.py")
            for name in re.findall(r'"(gen_ai\.[a-z0-9_.]+)"', (root / path).read_text())}
    assert used - known == of_vllm
