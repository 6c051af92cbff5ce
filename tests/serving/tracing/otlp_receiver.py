"""Collectors that keep what they are sent: OpenTelemetry's own service over gRPC, and its messages over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.deadlines import PATIENCE_S

Value = str | int | float | tuple[str, ...]


@dataclass
class Received:
    """A span, and who sent it."""

    service: str
    instance: str
    span: Span
    attributes: dict[str, Value]

    @property
    def took_s(self) -> float:
        return (self.span.end_time_unix_nano - self.span.start_time_unix_nano) / 1e9


@dataclass
class Receiver:
    """Is open until the context of `grpc_receiver` or `http_receiver` is left."""

    spans: list[Received] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    endpoint: str = ""
    may_answer: threading.Event = field(default_factory=threading.Event)    # set at first
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self, request: pb.ExportTraceServiceRequest, headers: dict[str, str]) -> None:
        assert self.may_answer.wait(PATIENCE_S), "the test lets it answer"
        with self._changed:
            self.headers.append(headers)
            for each in request.resource_spans:
                resource = attributes_of(each.resource.attributes)
                self.spans += [Received(str(resource["service.name"]), str(resource["service.instance.id"]), span,
                                        attributes_of(span.attributes))
                               for scope in each.scope_spans for span in scope.spans]
            self._changed.notify_all()

    def until(self, num_spans: int) -> list[Received]:
        """Wait for so many spans, and return them in the order in which they began."""
        self.until_has(lambda spans: len(spans) >= num_spans)
        return sorted(self.spans, key=lambda each: each.span.start_time_unix_nano)

    def until_has(self, condition: Callable[[list[Received]], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.spans), PATIENCE_S), "the spans were not sent"


def attributes_of(pairs: Iterable[KeyValue]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for pair in pairs:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        found[pair.key] = tuple(each.string_value for each in value.values) if kind == "array_value" else value
    return found


@contextmanager
def grpc_receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    receiver.may_answer.set()

    class Servicer(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext
                   ) -> pb.ExportTraceServiceResponse:
            receiver.take(request, {key: str(value) for key, value in context.invocation_metadata()})
            return pb.ExportTraceServiceResponse()

    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Servicer(), server)
        receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield receiver
        finally:
            receiver.may_answer.set()
            server.stop(None).wait()


@contextmanager
def http_receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    receiver.may_answer.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
            receiver.take(pb.ExportTraceServiceRequest.FromString(content),
                          {key.lower(): value for key, value in self.headers.items()})
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            receiver.may_answer.set()
            server.shutdown()
            thread.join()


RECEIVERS = {"grpc": grpc_receiver, "http": http_receiver}
