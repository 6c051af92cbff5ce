"""The HTTP door opens on a socket of its caller's, and ends without losing a request."""

from __future__ import annotations

import asyncio
import signal

import httpx
import pytest
from starlette.applications import Starlette

from cluster.device.node import listen
from serving.ingress.http_server import HttpServer
from tests.serving.ingress.conftest import FakeService
from tests.serving.ingress.test_http_protocol import STREAM, WHOLE, opened


@pytest.mark.parametrize(("host", "clients"), [("127.0.0.1", ["127.0.0.1"]), ("::1", ["::1"]),
                                               ("::", ["127.0.0.1", "::1"])])
async def test_it_listens_where_it_is_told(app: Starlette, host: str, clients: list[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    server, listener = HttpServer(app), listen(host, 0)
    await server.start(listener)
    for client in clients:
        url = f"http://{f'[{client}]' if ':' in client else client}:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(trust_env=False) as http:
            assert (await http.get(f"{url}/health")).status_code == 200
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    server.refuse()
    server.close()


async def test_it_refuses_newcomers_and_finishes_what_is_open(app: Starlette, service: FakeService) -> None:
    service.stalls = True
    async with opened(app) as door, door.client() as streaming, door.client() as idle, asyncio.timeout(30):
        await streaming.send(STREAM)
        assert (await idle.ask(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")).status == 200
        await service.started.wait()
        door.server.refuse()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", door.port)
        assert await idle.is_closed()
        draining = asyncio.create_task(door.server.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        service.resume.set()
        answer = await streaming.answer()
        assert answer.content.endswith(b"data: [DONE]\n\n") and await streaming.is_closed()
        await draining


async def test_a_request_that_comes_while_it_ends_is_answered(app: Starlette, service: FakeService) -> None:
    """On a connection whose other request holds it open."""
    service.stalls = True
    async with opened(app) as door, door.client() as client, asyncio.timeout(30):
        await client.send(STREAM)
        await service.started.wait()
        door.server.refuse()
        service.resume.set()
        assert (await client.answer()).status == 200


async def test_what_does_not_end_is_cut(app: Starlette, service: FakeService) -> None:
    service.stalls = True
    async with opened(app) as door, door.client() as client, asyncio.timeout(30):
        await client.send(WHOLE)
        await service.started.wait()
        door.server.refuse()
        door.server.close()
        await service.closed.wait()
        await door.server.drain()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await client.answer()


def test_a_port_that_is_taken_is_an_error() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(OSError):
        listen("127.0.0.1", taken.getsockname()[1])
