"""Tell Ray Serve's HTTP proxies how to treat our requests and answers."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets import auto as websockets_auto

from cluster.device.file_limit import raise_file_limit

# Serve calls what this variable of a node's environment names, in every proxy, before it listens.
CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.http_proxy.prepare"}


def prepare() -> list[Middleware]:
    """Let the proxy read the body of a request that offers another protocol, as Java's client and `curl --http2` do
    (`Upgrade: h2c`), or a web socket, of which there is none. uvicorn's own choice of a parser, httptools, stops at
    such a header and loses the body. And let it hold as many connections as the system lets: beyond its soft limit of
    files it would drop them unanswered."""
    raise_file_limit()
    auto.AutoHTTPProtocol = H11Protocol
    websockets_auto.AutoWebSocketsProtocol = None
    return []


class WithoutRequestId:
    """Leave the header x-request-id to Serve's proxy, which adds the one of the request to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)
        await self._app(scope, receive, send_without)
