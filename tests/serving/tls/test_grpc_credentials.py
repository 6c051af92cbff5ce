"""gRPC servers and channels with certificates that are renewed, over real connections."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from serving.config import ClusterTlsConfig, TlsConfig
from serving.link.channel_options import DIRECT
from serving.tls.grpc_credentials import channel_credentials, server_credentials
from serving.tls.identity import CLUSTER_NAME, RenewedIdentity, read_identity
from tests.certificates import Authority, Issued, replace_file
from tests.deadlines import PATIENCE_S

AUTHORITY = Authority()
OPTIONS = [*DIRECT, ("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", CLUSTER_NAME)]
SERVING = health_pb2.HealthCheckResponse.SERVING


def files_of(folder: Path, issued: Issued, authority: Authority | None = None) -> TlsConfig:
    certificate, key = issued.write(folder)
    if authority is None:
        return TlsConfig(certificate=certificate, key=key)
    replace_file(folder / "ca.crt", authority.pem)
    return ClusterTlsConfig(certificate=certificate, key=key, ca=str(folder / "ca.crt"))


@asynccontextmanager
async def opened(files: TlsConfig) -> AsyncIterator[int]:
    server, servicer = grpc.aio.server(), health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(RenewedIdentity(files, "tls")))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def is_served(port: int, credentials: grpc.ChannelCredentials) -> bool:
    """Raises AioRpcError when the two do not trust each other."""
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=OPTIONS) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        return answer.status == SERVING


async def test_a_door_serves_whoever_trusts_its_ca(tmp_path: Path) -> None:
    async with opened(files_of(tmp_path, AUTHORITY.issue(CLUSTER_NAME))) as port:
        assert await is_served(port, grpc.ssl_channel_credentials(AUTHORITY.pem))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await is_served(port, grpc.ssl_channel_credentials(Authority("another").pem))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_with_a_ca_clients_show_a_certificate_of_it(tmp_path: Path) -> None:
    files = files_of(tmp_path, AUTHORITY.issue(CLUSTER_NAME), AUTHORITY)
    stranger = Authority("another").issue(CLUSTER_NAME)
    async with opened(files) as port:
        assert await is_served(port, channel_credentials(read_identity(files, "cluster_tls")))
        for credentials in (grpc.ssl_channel_credentials(AUTHORITY.pem),
                            grpc.ssl_channel_credentials(AUTHORITY.pem, stranger.key, stranger.certificate)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await is_served(port, credentials)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_who_speaks_no_tls_is_refused(tmp_path: Path) -> None:
    async with (opened(files_of(tmp_path, AUTHORITY.issue(CLUSTER_NAME))) as port,
                grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_renewed_certificate_and_ca_count_for_newcomers_while_a_stream_goes_on(tmp_path: Path) -> None:
    """The CA is another one too: who has the old certificate gets no new connection, but keeps the one that it has."""
    newer = Authority("another")
    files = files_of(tmp_path, AUTHORITY.issue(CLUSTER_NAME), AUTHORITY)
    old = channel_credentials(read_identity(files, "cluster_tls"))
    async with opened(files) as port, grpc.aio.secure_channel(f"127.0.0.1:{port}", old, options=OPTIONS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        files_of(tmp_path, newer.issue(CLUSTER_NAME), newer)
        assert await is_served(port, channel_credentials(read_identity(files, "cluster_tls")))
        with pytest.raises(grpc.aio.AioRpcError):
            await is_served(port, old)
        assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)).status == SERVING
        assert not watch.done()
        watch.cancel()
