"""Our own commands know doors by the file of their certificate, under whatever address they reach them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.coordinator.view import ClusterStatus, GroupPhase, RouterReport, View
from cluster.launch.bring_up import answers
from cluster.launch.door_trust import DoorTrust, split_address
from cluster.router_doors import RouterDoors
from serving.config import RouterConfig, TlsConfig, parse_config
from serving.ingress.grpc.server import build_grpc_server
from serving.ingress.http.app import build_http_app
from serving.ingress.http.server import HttpServer
from serving.text.tokenizer import Tokenizer
from serving.tls.identity import RenewedIdentity
from tests.certificates import Authority, replace_file
from tests.deadlines import PATIENCE_S
from tests.serving.conftest import byte_level_tokenizer
from tests.serving.ingress.conftest import FakeService

AUTHORITY = Authority()
SERVING = health_pb2.HealthCheckResponse.SERVING


@asynccontextmanager
async def opened(folder: Path, name: str) -> AsyncIterator[tuple[RouterDoors, TlsConfig]]:
    """Open both doors of one router with a certificate for `name`, which is not where they are."""
    certificate, key = AUTHORITY.issue(name).write(folder)
    files = TlsConfig(certificate=certificate, key=key)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    service = FakeService(Tokenizer.from_dir(folder))
    app = build_http_app(service, service.tokenizer, RouterConfig(), lambda: (b"", "text/plain"))
    doors = RouterDoors(HttpServer(app), build_grpc_server(service, service.tokenizer), "127.0.0.1", "127.0.0.9",
                        RenewedIdentity(files, "tls"))
    await doors.open(0, 0)
    try:
        yield doors, files
    finally:
        doors.refuse()
        await doors.close()


async def is_healthy(doors: RouterDoors, trust: DoorTrust) -> bool:
    """Raises httpx.ConnectError or grpc.RpcError where the doors are not trusted."""
    async with httpx.AsyncClient(verify=trust.context(), trust_env=False) as http:
        by_http = await http.get(f"https://{doors.http_address}/health")
    return by_http.status_code == 200 and await asyncio.to_thread(is_serving, doors.grpc_address, trust)


def is_serving(address: str, trust: DoorTrust) -> bool:
    with trust.channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        return bool(answer.status == SERVING)


@pytest.mark.parametrize("name", ["llm.example", "*.llm.example", "10.1.2.3"])
async def test_the_doors_own_certificate_is_trusted_under_any_address(tmp_path: Path, name: str) -> None:
    async with opened(tmp_path, name) as (doors, files):
        assert await is_healthy(doors, DoorTrust(files.certificate))


async def test_another_certificate_of_the_same_ca_is_not_trusted(tmp_path: Path) -> None:
    """Nor is what the system does not know, where there is no file."""
    async with opened(tmp_path, "llm.example") as (doors, _):
        other, _ = AUTHORITY.issue("llm.example").write(tmp_path, "other")
        for trust in (DoorTrust(other), DoorTrust(), DoorTrust(str(tmp_path / "none.crt"))):
            async with httpx.AsyncClient(verify=trust.context(), trust_env=False) as http:
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await http.get(f"https://{doors.http_address}/health")
            with pytest.raises(grpc.RpcError):
                await asyncio.to_thread(is_serving, doors.grpc_address, trust)


async def test_up_asks_routers_by_tls(tmp_path: Path) -> None:
    async with opened(tmp_path, "llm.example") as (doors, files):
        report = RouterReport("r", "n", doors.http_address, doors.grpc_address, 0, is_ready=False)
        status = ClusterStatus(View(GroupPhase.WAITING, None), (), (report,))
        config = parse_config({"model": {"path": "x"}, "pools": [{}], "tls": files.model_dump()})
        assert await asyncio.to_thread(answers, config, status)
        assert not await asyncio.to_thread(answers, config.model_copy(update={"tls": None}), status)
        replace_file(tmp_path / "door.crt", b"-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n")
        assert not await asyncio.to_thread(answers, config, status)
        with pytest.raises(ssl.SSLError):
            DoorTrust(files.certificate).context()


def test_an_address_may_say_that_it_speaks_tls() -> None:
    assert split_address("[::1]:8000") == split_address("http://[::1]:8000") == ("[::1]:8000", None)
    assert split_address("https://llm.example:443") == ("llm.example:443", DoorTrust())
