"""Nobody speaks on a shard's links who does not know its token, nor, where there are certificates, without one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest

from model.transport.address import EndpointAddress, Secret
from serving.config import ClusterTlsConfig
from serving.link.channel_options import channel_options
from serving.link.client import ShardLinkClient, SubmissionQueue
from serving.link.epoch import Member
from serving.link.peer_ringer import PeerRinger
from serving.link.security import PLAIN, LinkSecurity, proof_for
from serving.link.server import ShardLinkServer, start_link_server
from serving.proto import shard_pb2, shard_pb2_grpc
from serving.tls.identity import CLUSTER_NAME, RenewedIdentity
from tests.certificates import Authority, replace_file
from tests.deadlines import PATIENCE_S
from tests.serving.link.fake_link import NUM_EMBEDDINGS, RecordingEngine, RecordingOwner, clock, member

SHARD = EndpointAddress("0" * 32, "127.0.0.1", 1, "", Secret("the token"))
STRANGER = replace(SHARD, token=Secret("another token"))
AUTHORITY = Authority()


@dataclass
class Shard:
    engine: RecordingEngine
    port: int

    @property
    def member(self) -> Member:
        return replace(member(self.port), endpoint=SHARD)


@asynccontextmanager
async def served(security: LinkSecurity = PLAIN) -> AsyncIterator[Shard]:
    engine, servicer = RecordingEngine(), ShardLinkServer("s0", clock)
    server, port = await start_link_server(servicer, "127.0.0.1:0", own=SHARD, security=security)
    servicer.serve(engine, NUM_EMBEDDINGS)
    try:
        yield Shard(engine, port)
    finally:
        servicer.stop("the test ends")
        await server.stop(None)


@asynccontextmanager
async def linked(shard: Shard, security: LinkSecurity = PLAIN) -> AsyncIterator[tuple[ShardLinkClient, RecordingOwner]]:
    owner = RecordingOwner()
    link = ShardLinkClient(shard.member, lambda: SubmissionQueue("s0", "r", 8, clock), owner, security=security)
    link.start()
    try:
        await owner.changed.until(lambda: owner.num_connected == 1)
        yield link, owner
    finally:
        await link.close()


def security_of(folder: Path, authority: Authority = AUTHORITY) -> LinkSecurity:
    """Make new files, of a new certificate."""
    certificate, key = authority.issue(CLUSTER_NAME).write(folder, "link")
    replace_file(folder / "ca.crt", authority.pem)
    files = ClusterTlsConfig(certificate=certificate, key=key, ca=str(folder / "ca.crt"))
    return LinkSecurity(RenewedIdentity(files, "cluster_tls"))


async def code_of_ring(shard: Shard, security: LinkSecurity, known: EndpointAddress | None = SHARD) -> grpc.StatusCode:
    async with security.channel(shard.member.link_address, channel_options()) as channel:
        ring = shard_pb2_grpc.ShardLinkStub(channel).Ring(
            shard_pb2.RingRequest(epoch_number=1, step_index=2), timeout=PATIENCE_S, metadata=proof_for(known))
        return await ring.code()


@pytest.mark.parametrize("known", [None, STRANGER, replace(SHARD, peer_id="1" * 32)], ids=["none", "wrong", "other"])
async def test_a_stranger_ends_and_wakes_nothing(known: EndpointAddress | None) -> None:
    """It knows the ids of shard and router, and would take the router's place. It is refused before it has sent
    anything: of a call that ends while it writes, grpc.aio says INTERNAL."""
    async with served() as shard, linked(shard) as (link, owner):
        async with PLAIN.channel(shard.member.link_address, channel_options()) as channel:
            stub, blocks = shard_pb2_grpc.ShardLinkStub(channel), shard_pb2_grpc.BlockLinkStub(channel)
            for call in (stub.Connect(timeout=PATIENCE_S, metadata=proof_for(known)),
                         blocks.Fetch(timeout=PATIENCE_S, metadata=proof_for(known))):
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert await code_of_ring(shard, PLAIN, known) is grpc.StatusCode.UNAUTHENTICATED
        assert await code_of_ring(shard, PLAIN) is grpc.StatusCode.OK
        assert shard.engine.rings == [(1, 2)] and shard.engine.disconnected == []
        assert link.is_connected and owner.num_connected == 1


async def test_with_certificates_both_sides_show_one_of_the_clusters_ca(tmp_path: Path) -> None:
    security = security_of(tmp_path)
    (tmp_path / "other").mkdir()
    stranger = security_of(tmp_path / "other", Authority("another"))
    async with served(security) as shard, linked(shard, security) as (link, _):
        for other in (PLAIN, stranger):
            assert await code_of_ring(shard, other) is grpc.StatusCode.UNAVAILABLE
        ringer = PeerRinger([shard.member, shard.member], 1, my_rank=0, security=security)
        await ringer.ring_peers(3)
        await ringer.close()
        assert shard.engine.rings == [(1, 3)] and link.is_connected


async def test_a_renewed_certificate_is_shown_by_whoever_connects_and_streams_go_on(tmp_path: Path) -> None:
    """The CA is another one too: what was made before would not be believed."""
    security = security_of(tmp_path)
    async with served(security) as shard, linked(shard, security) as (link, owner):
        ringer = PeerRinger([shard.member, shard.member], 1, my_rank=0, security=security)
        await ringer.ring_peers(3)
        before = link.load
        security_of(tmp_path, Authority("another"))
        await ringer.ring_peers(4)
        assert shard.engine.rings == [(1, 3), (1, 4)] and link.load is before and owner.errors == []
        assert link._task is not None
        link._task.cancel()                     # its stream breaks
        await owner.changed.until(lambda: owner.num_connected == 2)
        await ringer.close()


def test_the_proof_is_not_the_token() -> None:
    ((_, proof),) = proof_for(SHARD)
    assert proof_for(None) == () and SHARD.token.reveal() not in proof and proof_for(STRANGER) != proof_for(SHARD)
