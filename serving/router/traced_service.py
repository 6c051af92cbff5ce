"""Makes a span of each client's request, with attributes by OpenTelemetry's conventions for generative AI; latencies
are named as vLLM names them. Nothing of prompts and answers is in it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from serving.router.generation import GenerationDelta, GenerationRequest, Service
from serving.router.request_tally import RequestTally
from serving.router.wrapped_service import WrappedService
from serving.tracing.request_trace import Untraced

if TYPE_CHECKING:
    from serving.tracing.tracer import Tracer


class TracedService(WrappedService):
    def __init__(self, service: Service, tracer: Tracer, clock: Callable[[], float]) -> None:
        super().__init__(service)
        self._tracer = tracer
        self._clock = clock

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, GenerationDelta]]:
        """See Service."""
        trace = self._tracer.begin("llm_request", requests[0].traceparent, _asked(requests))
        tally = RequestTally(requests, self._clock)
        try:
            with tally:
                async with aclosing(self._service.generate(
                        [replace(request, trace=trace) for request in requests])) as deltas:
                    async for item in deltas:
                        tally.add(item[1])
                        yield item
        finally:
            if not isinstance(trace, Untraced):
                trace.end(tally.outcome, _got(tally))


def _asked(requests: Sequence[GenerationRequest]) -> dict[str, str | int | float]:
    first, params = requests[0], requests[0].params
    asked: dict[str, str | int | float] = {
        "gen_ai.operation.name": "chat" if first.prompt_field == "messages" else "text_completion",
        "gen_ai.request.model": first.model, "gen_ai.request.id": first.request_id,
        "gen_ai.request.choice.count": sum(request.params.n for request in requests),
        "gen_ai.request.temperature": params.temperature, "gen_ai.request.top_p": params.top_p,
        "moesaic.num_prompts": len(requests)}
    return asked if params.max_tokens is None else asked | {"gen_ai.request.max_tokens": params.max_tokens}


def _got(tally: RequestTally) -> dict[str, str | int | float | Sequence[str]]:
    got: dict[str, str | int | float | Sequence[str]] = {
        "gen_ai.usage.input_tokens": tally.num_prompt_tokens, "gen_ai.usage.output_tokens": tally.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": tally.num_cached_tokens, "gen_ai.latency.e2e": tally.took_s,
        "gen_ai.response.finish_reasons": tally.finish_reasons}
    if tally.first_token_s is not None:
        got["gen_ai.latency.time_to_first_token"] = tally.first_token_s
    return got
