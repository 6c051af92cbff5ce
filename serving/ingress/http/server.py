"""The HTTP door's server: uvicorn's protocol and configuration, on a socket and an event loop of the caller's.

uvicorn's own Server wakes ten times a second, takes the process's signals and exits it when it cannot start; none of
that belongs into a replica.
"""

from __future__ import annotations

import asyncio
import socket
import ssl

import uvicorn
from starlette.types import ASGIApp

from serving.ingress.http.protocol import KEEP_ALIVE_S, LINGER_S, BoundedProtocol, DoorState

_HANDSHAKE_S = 10.0     # a client that does not get on with TLS is hung up on


class HttpServer:
    """Serves one ASGI app. `start`, then `refuse`, `drain` and `close`, in this order."""

    def __init__(self, app: ASGIApp, max_connections: int = 8192) -> None:
        # Without log_config uvicorn leaves all loggers but its own as they are.
        self._config = uvicorn.Config(
            app, http=BoundedProtocol, ws="none", lifespan="off", interface="asgi3", proxy_headers=False,
            timeout_keep_alive=int(KEEP_ALIVE_S), log_config=None, log_level="error", access_log=False)
        self._state = DoorState(max_connections)
        self._server: asyncio.Server | None = None

    async def start(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve in the running loop what comes to a socket that listens; with `tls` HTTPS and nothing else."""
        self._config.load()
        self._server = await asyncio.get_running_loop().create_server(
            self._new_protocol, sock=listener, ssl=tls, ssl_handshake_timeout=_HANDSHAKE_S if tls else None,
            ssl_shutdown_timeout=LINGER_S if tls else None)

    @property
    def connections(self) -> list[BoundedProtocol]:
        return [one for one in self._state.connections if isinstance(one, BoundedProtocol)]

    def refuse(self) -> None:
        """Take no new connections; the next answer of each that is there is its last."""
        self._state.is_ending = True
        if self._server is not None:
            self._server.close()
        for connection in self.connections:
            connection.shutdown()

    async def drain(self) -> None:
        """Return when no request is open."""
        while self._state.tasks:
            await asyncio.wait(set(self._state.tasks))

    def close(self) -> None:
        """End what is still open."""
        for connection in self.connections:
            connection.transport.abort()

    def _new_protocol(self) -> BoundedProtocol:
        return BoundedProtocol(self._config, self._state, {})
