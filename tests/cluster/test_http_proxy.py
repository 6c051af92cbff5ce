"""Our app behind the server of Serve's proxies."""

from __future__ import annotations

import asyncio
import warnings

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http import auto
from uvicorn.protocols.websockets import auto as websockets_auto

from cluster.http_proxy import CALLBACK, WithoutRequestId
from tests.deadlines import PATIENCE_S

with warnings.catch_warnings():
    warnings.simplefilter("ignore")         # Ray's own, at import
    from ray.serve._private.http_util import RequestIdMiddleware
    from ray.serve._private.utils import call_function_from_import_path


async def _echo(request: Request) -> Response:
    return Response(await request.body(), headers={"x-request-id": "ours"})


async def _posted(app: Starlette, head: bytes, body: bytes) -> bytes:
    config = uvicorn.Config(app, port=0, lifespan="off", log_level="critical")
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    loop = asyncio.create_task(server.main_loop())
    reader, writer = await asyncio.open_connection("127.0.0.1", server.servers[0].sockets[0].getsockname()[1])
    writer.write(b"POST / HTTP/1.1\r\nhost: a\r\n%scontent-length: %d\r\n\r\n" % (head, len(body)) + body)
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        content = await reader.readexactly(length)
    writer.close()
    server.should_exit = True
    await loop
    await server.shutdown()
    return content


@pytest.mark.parametrize("head", [
    b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
    b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZQ==\r\n"])
async def test_an_offer_of_another_protocol_loses_no_body(monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    app = Starlette(routes=[Route("/", _echo, methods=["POST"])])
    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)    # prepare() changes the process
    monkeypatch.setattr(websockets_auto, "AutoWebSocketsProtocol", websockets_auto.AutoWebSocketsProtocol)
    (path,) = CALLBACK.values()
    assert call_function_from_import_path(path) == []
    assert await _posted(app, head, b"hello") == b"hello"
    assert await _posted(app, b"", b"hello") == b"hello"


async def test_behind_the_proxy_an_answer_has_one_request_id() -> None:
    app = Starlette(routes=[Route("/", _echo, methods=["POST"])])
    app.add_middleware(WithoutRequestId)
    transport = httpx.ASGITransport(RequestIdMiddleware(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for path, given in (("/", "mine"), ("/", None), ("/nowhere", "mine")):
            response = await http.post(path, headers={} if given is None else {"x-request-id": given})
            found = response.headers.get_list("x-request-id")
            assert len(found) == 1 and found[0] == (given or found[0])
