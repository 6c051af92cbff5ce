"""The HTTP door opens on a socket of its caller's, and ends without losing a request."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import openai
import pytest
from starlette.applications import Starlette

from cluster.device.node import listen
from serving.config import TlsConfig
from serving.ingress.http import server as http_server
from serving.ingress.http.server import HttpServer
from serving.tls.door_context import door_context
from serving.tls.identity import RenewedIdentity
from tests.certificates import Authority, Issued, serial_of
from tests.deadlines import PATIENCE_S
from tests.serving.ingress.conftest import FakeService
from tests.serving.ingress.http.test_protocol import STREAM, WHOLE, opened

AUTHORITY = Authority()
TEXT_STREAM = {"model": "tiny", "prompt": "hello", "temperature": 0, "max_tokens": 9, "stream": True}


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
    async with opened(app) as door, door.client() as streaming, door.client() as idle, asyncio.timeout(PATIENCE_S):
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
    async with opened(app) as door, door.client() as client, asyncio.timeout(PATIENCE_S):
        await client.send(STREAM)
        await service.started.wait()
        door.server.refuse()
        service.resume.set()
        assert (await client.answer()).status == 200


async def test_what_does_not_end_is_cut(app: Starlette, service: FakeService) -> None:
    service.stalls = True
    async with opened(app) as door, door.client() as client, asyncio.timeout(PATIENCE_S):
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


# With TLS.

@asynccontextmanager
async def opened_with_tls(app: Starlette, folder: Path, issued: Issued) -> AsyncIterator[int]:
    certificate, key = issued.write(folder)
    server, listener = HttpServer(app), listen("127.0.0.1", 0)
    identity = RenewedIdentity(TlsConfig(certificate=certificate, key=key), "tls")
    await server.start(listener, door_context(identity))
    try:
        yield int(listener.getsockname()[1])
    finally:
        server.refuse()
        server.close()


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority.pem.decode())


async def shown_serial(port: int) -> int:
    """Return the number of the certificate that a newcomer is shown."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(AUTHORITY))
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return serial_of(shown)


async def test_the_official_client_asks_with_the_cas_file(app: Starlette, tmp_path: Path) -> None:
    async with opened_with_tls(app, tmp_path, AUTHORITY.issue("127.0.0.1")) as port:
        http = httpx.AsyncClient(verify=trusting(AUTHORITY), trust_env=False)
        url = f"https://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=http) as client:
            stream = await client.completions.create(model="tiny", prompt="hello", max_tokens=4, stream=True)
            assert [chunk.choices[0].finish_reason async for chunk in stream][-1] == "length"


async def test_who_does_not_trust_the_ca_hangs_up(app: Starlette, tmp_path: Path) -> None:
    async with opened_with_tls(app, tmp_path, AUTHORITY.issue("127.0.0.1")) as port, httpx.AsyncClient(
            verify=trusting(Authority("another")), trust_env=False) as http:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await http.get(f"https://127.0.0.1:{port}/health")
        assert await shown_serial(port)     # others are served


async def test_who_speaks_no_tls_is_hung_up_on(app: Starlette, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_HANDSHAKE_S", 0.2)
    async with opened_with_tls(app, tmp_path, AUTHORITY.issue("127.0.0.1")) as port, asyncio.timeout(PATIENCE_S):
        plain, half_a_hello, nothing = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b""
        for sent in (plain, half_a_hello, nothing):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            assert b"HTTP" not in await reader.read()
            writer.close()


async def test_a_renewed_certificate_is_shown_to_newcomers_while_a_stream_goes_on(
        app: Starlette, service: FakeService, tmp_path: Path) -> None:
    first, second = AUTHORITY.issue("127.0.0.1"), AUTHORITY.issue("127.0.0.1")
    service.stalls = True
    async with opened_with_tls(app, tmp_path, first) as port, httpx.AsyncClient(
            verify=trusting(AUTHORITY), trust_env=False, timeout=PATIENCE_S) as http, http.stream(
            "POST", f"https://127.0.0.1:{port}/v1/completions", json=TEXT_STREAM) as answer:
        lines = answer.aiter_lines()
        began = await anext(lines)
        assert await shown_serial(port) == serial_of(first.certificate)
        second.write(tmp_path)
        assert await shown_serial(port) == serial_of(second.certificate)
        service.resume.set()
        rest = [line async for line in lines if line]
    assert json.loads(began.removeprefix("data: "))["choices"] and rest[-1] == "data: [DONE]"
