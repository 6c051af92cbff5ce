"""Makes spans and has them sent by OTLP, with OpenTelemetry's own libraries.

Spans that have ended wait in a bounded queue for a thread that sends them; when it is full the oldest are dropped. So a
collector that is slow or away costs spans and nothing else.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.config import TracingConfig
from serving.tracing.request_trace import UNTRACED, Untraced

Attributes = Mapping[str, str | int | float | Sequence[str]]

MAX_QUEUED_SPANS = 4096
MAX_SPANS_A_MESSAGE = 512
SEND_INTERVAL_MS = 1000.0
SEND_TIMEOUT_S = 5.0        # of one message, with its repetitions
GOODBYE_S = 2.0             # for what is still queued when the process ends

_PROPAGATOR = TraceContextTextMapPropagator()


class Tracer:
    """Makes the spans of one process."""

    def __init__(self, config: TracingConfig, role: str, instance_id: str, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wall_ns = time.time_ns() - int(clock() * 1e9)     # of the clock's zero
        resource = Resource.create({"service.name": f"moesaic-{role}", "service.instance.id": instance_id,
                                    "service.version": version("moesaic")})
        self._provider = TracerProvider(ParentBased(TraceIdRatioBased(config.sample_ratio)), resource,
                                        shutdown_on_exit=False)         # it would wait for a collector that is away
        self._provider.add_span_processor(BatchSpanProcessor(
            new_exporter(config), MAX_QUEUED_SPANS, SEND_INTERVAL_MS, MAX_SPANS_A_MESSAGE))
        self._tracer = self._provider.get_tracer("moesaic")

    def begin(self, name: str, traceparent: str, attributes: Attributes) -> OpenTrace | Untraced:
        """Begin the span of a whole request, below the client's if that sent its header. UNTRACED when it, or
        the sampling, does not want this one."""
        span = self._start(name, traceparent, self._clock(), SpanKind.SERVER, attributes)
        return OpenTrace(self, span) if span.is_recording() else UNTRACED

    def add(self, name: str, traceparent: str, began_s: float, ended_s: float, attributes: Attributes) -> None:
        """Add a span that has ended to the trace of that header."""
        span = self._start(name, traceparent, began_s, SpanKind.INTERNAL, attributes)
        self.end(span, ended_s)

    def end(self, span: Span, at_s: float | None = None) -> None:
        """`at_s` None: now."""
        span.end(self._ns(self._clock() if at_s is None else at_s))

    async def close(self) -> None:
        """Send what is queued, as far as that takes no longer than GOODBYE_S."""
        sender = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sender.start()
        await asyncio.to_thread(sender.join, GOODBYE_S)

    def _start(self, name: str, traceparent: str, at_s: float, kind: SpanKind, attributes: Attributes) -> Span:
        parent = _PROPAGATOR.extract({"traceparent": traceparent}, Context())
        return self._tracer.start_span(name, parent, kind, dict(attributes), start_time=self._ns(at_s))

    def _ns(self, at_s: float) -> int:
        return self._wall_ns + int(at_s * 1e9)


class OpenTrace:
    """See RequestTrace. Is the span of a request until `end`."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._num_moves = 0
        self._was_queued = False
        header: dict[str, str] = {}
        _PROPAGATOR.inject(header, set_span_in_context(span, Context()))
        self.traceparent = header["traceparent"]

    def queued(self, began_s: float, ended_s: float) -> None:
        self._tracer.add("queue", self.traceparent, began_s, ended_s, {})
        if not self._was_queued:        # of several prompts the first
            self._was_queued = True
            self._span.set_attribute("gen_ai.latency.time_in_queue", ended_s - began_s)

    def moved(self, cause: str) -> None:
        self._num_moves += 1
        self._span.add_event("moved", {"moesaic.cause": cause})

    def end(self, outcome: str, attributes: Attributes) -> None:
        """End it. An outcome that is no word of ours is the class of an error, whose text may quote the client."""
        self._span.set_attributes({**attributes, "moesaic.outcome": outcome, "moesaic.moves": self._num_moves})
        if outcome not in ("finished", "cancelled"):
            self._span.set_attribute("error.type", outcome)
            self._span.set_status(Status(StatusCode.ERROR))
        self._tracer.end(self._span)


def new_exporter(config: TracingConfig) -> SpanExporter:
    """Return what sends spans to the config's endpoint. Headers come from OTEL_EXPORTER_OTLP_HEADERS, which the
    libraries read."""
    if config.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(config.endpoint, timeout=SEND_TIMEOUT_S)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter(f"{config.endpoint.rstrip('/')}/v1/traces", timeout=SEND_TIMEOUT_S)
