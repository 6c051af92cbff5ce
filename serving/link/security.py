"""Who may speak on the links. Every call shows that its caller knows the token of the shard that it calls, which only
members and routers are told. With `cluster_tls` in the config both sides also show certificates of the cluster's CA,
and nothing is said in the clear.

Certificates of links are for one name, whatever the address: those of pods change.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

import grpc

from model.transport.address import EndpointAddress
from serving.config import ServeConfig
from serving.link.channel_options import Options
from serving.tls.grpc_credentials import channel_credentials, server_credentials
from serving.tls.identity import CLUSTER_NAME, Identity, RenewedIdentity

_PROOF_KEY = "moesaic-proof"

Metadata = tuple[tuple[str, str], ...]
Handler: TypeAlias = grpc.RpcMethodHandler


class LinkSecurity:
    """Opens channels and ports. Without an identity they are plain."""

    def __init__(self, identity: RenewedIdentity | None = None) -> None:
        self._identity = identity

    @property
    def identity(self) -> Identity | None:
        """Return what a channel opened now would show: another object when it was renewed."""
        return self._identity.current() if self._identity else None

    def channel(self, address: str, options: Options) -> grpc.aio.Channel:
        """Return one that shows the certificate of this moment to its end: open another for what is renewed."""
        identity = self.identity
        if identity is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, channel_credentials(identity), options=[
            *options, ("grpc.ssl_target_name_override", CLUSTER_NAME)])

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Return the port. Raises RuntimeError when it is taken."""
        port = server.add_insecure_port(address) if self._identity is None \
            else server.add_secure_port(address, server_credentials(self._identity))
        return int(port)


PLAIN = LinkSecurity()


def link_security(config: ServeConfig) -> LinkSecurity:
    """Raises ConfigError."""
    return LinkSecurity(RenewedIdentity(config.cluster_tls, "cluster_tls") if config.cluster_tls else None)


def proof_for(shard: EndpointAddress | None) -> Metadata:
    """Return what a call to that shard has to carry; who reads it does not know the token. None: it asks for none."""
    return () if shard is None else ((_PROOF_KEY, _proof(shard)),)


class ProofInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls of strangers before anything of them is read."""

    def __init__(self, own: EndpointAddress) -> None:
        self._proof = _proof(own)
        self._refusal = grpc.stream_stream_rpc_method_handler(_refuse)      # reads nothing, whatever the method

    async def intercept_service(self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
                                details: grpc.HandlerCallDetails) -> Handler:
        shown: Sequence[str] = [str(value) for key, value in details.invocation_metadata if key == _PROOF_KEY]
        if len(shown) == 1 and hmac.compare_digest(shown[0].encode(), self._proof.encode()):
            handler: Handler = await continuation(details)
            return handler
        return self._refusal


async def _refuse(_: object, context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this is the link of another cluster, or of a process "
                        "that has taken the port of one that is gone")


def _proof(shard: EndpointAddress) -> str:
    return hmac.new(shard.token.reveal().encode(), f"link {shard.peer_id}".encode(), hashlib.sha256).hexdigest()
