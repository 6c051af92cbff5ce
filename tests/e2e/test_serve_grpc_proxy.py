"""Shows what Ray Serve's own gRPC proxy carries and what not: why router replicas have a gRPC door of their own.

It carries cancellation and reflection. It does not carry grpc.health.v1 as probes and clients use it: they send no
`application` metadata, and so fail as soon as a cluster serves a second application, as do plain clients of ours. It
listens on all interfaces, whatever host HTTP is bound to, and makes each message of a stream a Ray object.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from serving.link.channel_options import DIRECT
from serving.proto import inference_pb2 as pb
from serving.proto.inference_pb2_grpc import InferenceStub
from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import eventually
from tests.ports import held_port

pytestmark = pytest.mark.multinode


@pytest.fixture(scope="module")
def proxy() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A Ray node of its own with Serve's gRPC proxy before a stub of our service, in a process of its own."""
    port = held_port()
    command = [sys.executable, "-m", "tests.e2e.serve_grpc_stub", str(port), str(held_port())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            answer(process)
            yield process, port
        finally:
            process.communicate("stop\n", timeout=PATIENCE_S)


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("stub: "):
            return line.removeprefix("stub: ").strip()
    raise AssertionError("the stub ended")


def ask(process: subprocess.Popen[str], command: str) -> str:
    assert process.stdin is not None
    process.stdin.write(f"{command}\n")
    process.stdin.flush()
    return answer(process)


def test_what_the_proxy_carries(proxy: tuple[subprocess.Popen[str], int]) -> None:
    process, port = proxy
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=DIRECT) as channel:
        health, stub = health_pb2_grpc.HealthStub(channel), InferenceStub(channel)
        replies = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=PATIENCE_S)
        names = [entry.name for reply in replies for entry in reply.list_services_response.service]
        assert "moesaic.v1.Inference" in names, "reflection works"

        for _ in range(3):      # Ray's proxy has lost one on a busy machine
            call = stub.Generate(pb.GenerateRequest(), timeout=PATIENCE_S)
            next(call)
            call.cancel()
            if eventually(lambda: ask(process, "cancelled?") == "yes", 10.0):
                break
        assert ask(process, "cancelled?") == "yes", "cancellation reaches the replica"

        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert answer.status == 1, "works with one application"
        assert ask(process, "second application") == "deployed"
        with pytest.raises(grpc.RpcError) as refused:
            health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND, "and with a second one no more"
        with pytest.raises(grpc.RpcError) as refused:
            stub.ListModels(pb.ListModelsRequest(), timeout=PATIENCE_S)
        assert "Application metadata not set" in refused.value.details()
    hosts = {entry.laddr.ip for entry in psutil.net_connections("tcp")
             if entry.status == psutil.CONN_LISTEN and entry.laddr.port == port}
    assert hosts <= {"::", "0.0.0.0"}, "all interfaces, though HTTP is bound to 127.0.0.1"
