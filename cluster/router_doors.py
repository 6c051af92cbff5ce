"""The doors of one router replica: the ports that they take, and how they end without losing a request.

Both doors get their certificate here, where there is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import grpc

from cluster.device.node import PortTakenError, host_and_port, listen, port_fault
from serving.ingress.http.server import HttpServer
from serving.tls.door_context import door_context
from serving.tls.grpc_credentials import server_credentials
from serving.tls.identity import RenewedIdentity

logger = logging.getLogger(__name__)

_PORTS_TO_TRY = 64      # several routers on one node take the next free ports
_ERRORS_S = 2.0         # from the end of all requests, with an error where need be, to the end of their connections
_NEVER_S = 3600.0       # close() comes before
OpenDoor = Callable[[int], Awaitable[int]]      # opens it at a port, 0 for any -> the port


class RouterDoors:
    """`open` both, then `refuse`, `drain` and `close`."""

    def __init__(self, http_server: HttpServer, grpc_server: grpc.aio.Server, host: str, node_address: str,
                 identity: RenewedIdentity | None = None) -> None:
        """`node_address` is shown to clients where `host` means every address of the node. With an `identity` the doors
        speak TLS only."""
        self._http_server = http_server
        self._grpc_server = grpc_server
        self._host = host
        self._identity = identity
        self._shown_host = node_address if host in ("0.0.0.0", "::") else host
        self.http_address = ""
        self.grpc_address = ""
        self._grpc_end: asyncio.Task[None] | None = None

    async def open(self, http_port: int, grpc_port: int) -> None:
        """Listen on these ports or the next free ones. Raises PortTakenError."""
        self.http_address = await self._first_free("http_port", http_port, self._open_http)
        self.grpc_address = await self._first_free("router.grpc_port", grpc_port, self._open_grpc)

    def refuse(self) -> None:
        """Take no new connections. What is open goes on."""
        self._http_server.refuse()
        self._grpc_end = asyncio.create_task(self._grpc_server.stop(_NEVER_S))

    async def drain(self) -> None:
        """Return when the HTTP door has answered all requests. Of the gRPC door, where health is watched for ever, the
        service knows when its requests are over."""
        await self._http_server.drain()

    async def close(self) -> None:
        """End the connections, once what is left has got its error, or its last message."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ERRORS_S):
                await asyncio.gather(self._http_server.drain(), self._grpc_server.stop(_ERRORS_S))
        self._http_server.close()
        await self._grpc_server.stop(grace=None)
        if self._grpc_end is not None:
            await self._grpc_end

    async def _first_free(self, key: str, first: int, open_at: OpenDoor) -> str:
        """Return the address for clients."""
        for port in [0] if first == 0 else range(first, min(first + _PORTS_TO_TRY, 65536)):
            if port_fault(self._host, port) is not None:
                continue
            with contextlib.suppress(OSError, RuntimeError):    # taken between the question and now
                shown = host_and_port(self._shown_host, await open_at(port))
                logger.info("door_open option=%s wanted=%d address=%s", key, first, shown)
                return shown
        raise PortTakenError(f"ports {first} to {first + _PORTS_TO_TRY - 1} are all taken on {self._host}",
                             fix=f"set {key} to another port, or to 0 for any")

    async def _open_http(self, port: int) -> int:
        listener = listen(self._host, port)
        await self._http_server.start(listener, door_context(self._identity) if self._identity else None)
        return int(listener.getsockname()[1])

    async def _open_grpc(self, port: int) -> int:
        address = host_and_port(self._host, port)
        bound: int = self._grpc_server.add_insecure_port(address) if self._identity is None \
            else self._grpc_server.add_secure_port(address, server_credentials(self._identity))
        await self._grpc_server.start()
        return bound
