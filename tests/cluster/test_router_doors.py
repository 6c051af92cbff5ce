"""Both doors of a router: next free ports, and an end that loses no request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.device.node import PortTakenError, listen
from cluster.router_doors import RouterDoors
from serving.config import RouterConfig
from serving.ingress.grpc.server import build_grpc_server
from serving.ingress.http.app import build_http_app
from serving.ingress.http.server import HttpServer
from serving.proto import inference_pb2 as pb
from serving.proto.inference_pb2_grpc import InferenceStub
from serving.text.tokenizer import Tokenizer
from tests.deadlines import PATIENCE_S
from tests.ports import held_port
from tests.serving.conftest import byte_level_tokenizer
from tests.serving.ingress.conftest import FakeService

TEXT = {"model": "tiny", "prompt": "hello world", "temperature": 0, "max_tokens": 9}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    return Tokenizer.from_dir(folder)


def new_doors(service: FakeService, host: str = "127.0.0.1") -> RouterDoors:
    config, tokenizer = RouterConfig(), service.tokenizer
    app = build_http_app(service, tokenizer, config, lambda: (b"", "text/plain"))
    return RouterDoors(HttpServer(app), build_grpc_server(service, tokenizer), host, "127.0.0.9")


@asynccontextmanager
async def opened(service: FakeService, http_port: int, grpc_port: int, host: str = "127.0.0.1"
                 ) -> AsyncIterator[RouterDoors]:
    doors = new_doors(service, host)
    await doors.open(http_port, grpc_port)
    try:
        yield doors
    finally:
        doors.refuse()
        await doors.close()


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


async def is_healthy(doors: RouterDoors, host: str) -> bool:
    async with httpx.AsyncClient(trust_env=False) as http:
        by_http = await http.get(f"http://{host}:{port_of(doors.http_address)}/health")
    async with grpc.aio.insecure_channel(f"{host}:{port_of(doors.grpc_address)}") as channel:
        by_grpc = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    return by_http.status_code == 200 and by_grpc.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(("host", "shown", "asked"), [
    ("127.0.0.1", "127.0.0.1", ["127.0.0.1"]), ("::1", "[::1]", ["[::1]"]),
    ("0.0.0.0", "127.0.0.9", ["127.0.0.1", "127.0.0.9"]), ("::", "127.0.0.9", ["127.0.0.1", "[::1]"])])
async def test_clients_are_told_an_address_that_they_reach(tokenizer: Tokenizer, host: str, shown: str,
                                                           asked: list[str]) -> None:
    async with opened(FakeService(tokenizer), 0, 0, host) as doors:
        for address in (doors.http_address, doors.grpc_address):
            assert address == f"{shown}:{port_of(address)}"
        for client_host in asked:
            assert await is_healthy(doors, client_host)


async def test_several_routers_on_one_node_take_the_next_free_ports(tokenizer: Tokenizer) -> None:
    service, first = FakeService(tokenizer), held_port()
    async with opened(service, first, first) as one, opened(service, first, first) as other:
        found = [port_of(address) for doors in (one, other) for address in (doors.http_address, doors.grpc_address)]
        assert found[0] == first and found == sorted(set(found)) and found[-1] - first < 64
        assert await is_healthy(one, "127.0.0.1") and await is_healthy(other, "127.0.0.1")


async def test_no_free_port_names_the_option(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.router_doors._PORTS_TO_TRY", 1)
    with listen("127.0.0.1", 0) as taken:
        port = int(taken.getsockname()[1])
        for http_port, grpc_port, key in ((port, 0, "http_port"), (0, port, r"router\.grpc_port")):
            doors = new_doors(FakeService(tokenizer))
            with pytest.raises(PortTakenError, match=f"set {key} to another port"):
                await doors.open(http_port, grpc_port)
            doors.refuse()
            await doors.close()


async def until_refused(port: int) -> None:
    """gRPC closes its port a moment later, on a thread of its own."""
    with suppress(OSError):
        while True:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            await writer.wait_closed()


async def test_the_end_refuses_newcomers_and_waits_for_what_is_open(tokenizer: Tokenizer) -> None:
    service = FakeService(tokenizer)
    service.stalls = True
    async with (opened(service, 0, 0) as doors, httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as http,
                grpc.aio.insecure_channel(doors.grpc_address) as channel, asyncio.timeout(PATIENCE_S)):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        responses = aiter(InferenceStub(channel).Generate(pb.GenerateRequest(model="tiny", text="hi")))
        await anext(responses)
        await service.started.wait()
        service.started.clear()
        asking = asyncio.create_task(http.post(f"http://{doors.http_address}/v1/completions", json=TEXT))
        await service.started.wait()
        doors.refuse()
        for address in (doors.http_address, doors.grpc_address):
            await until_refused(port_of(address))
        service.resume.set()
        await doors.drain()
        assert (await asking).status_code == 200
        assert [response async for response in responses][-1].finish_reason == "length"
        watch.cancel()
