"""Health follows the service's readiness."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.ingress.grpc.health import ReadinessHealth
from tests.deadlines import PATIENCE_S
from tests.serving.ingress.conftest import FakeService

STATUS = health_pb2.HealthCheckResponse


@pytest.fixture
async def stub(service: FakeService) -> AsyncIterator[health_pb2_grpc.HealthStub]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(ReadinessHealth(service, ["a.B"], watch_period_s=0.001), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)
    await server.stop(grace=None)


async def test_check_and_list(stub: health_pb2_grpc.HealthStub, service: FakeService) -> None:
    assert (await stub.Check(health_pb2.HealthCheckRequest(service="a.B"))).status == STATUS.SERVING
    service.ready = False
    assert (await stub.Check(health_pb2.HealthCheckRequest())).status == STATUS.NOT_SERVING
    listed = (await stub.List(health_pb2.HealthListRequest())).statuses
    assert {name: answer.status for name, answer in listed.items()} == dict.fromkeys(["", "a.B"], STATUS.NOT_SERVING)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="x"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watch_tells_each_change(stub: health_pb2_grpc.HealthStub, service: FakeService) -> None:
    call = stub.Watch(health_pb2.HealthCheckRequest())
    async with asyncio.timeout(PATIENCE_S):
        for ready, status in [(True, STATUS.SERVING), (False, STATUS.NOT_SERVING), (True, STATUS.SERVING)]:
            service.ready = ready
            assert (await call.read()).status == status
    call.cancel()


async def test_watching_an_unknown_service_is_no_error(stub: health_pb2_grpc.HealthStub) -> None:
    call = stub.Watch(health_pb2.HealthCheckRequest(service="x"))
    async with asyncio.timeout(PATIENCE_S):
        assert (await call.read()).status == STATUS.SERVICE_UNKNOWN
    call.cancel()
