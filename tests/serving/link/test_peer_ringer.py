from __future__ import annotations

import logging

import pytest

from serving.link.peer_ringer import PeerRinger
from serving.link.server import ShardLinkServer, start_link_server
from tests.serving.link.fake_link import NUM_EMBEDDINGS, RecordingEngine, clock, epoch_of


async def test_a_ring_reaches_every_peer_and_not_oneself() -> None:
    engines = [RecordingEngine() for _ in range(3)]
    servers = []
    for engine in engines:
        servicer = ShardLinkServer("s", clock)
        servicer.serve(engine, NUM_EMBEDDINGS)
        servers.append(await start_link_server(servicer, "127.0.0.1:0"))
    ringer = PeerRinger(epoch_of(4, *(port for _, port in servers)).members, 4, my_rank=1)
    ringer.connect()
    await ringer.ring_peers(17)
    assert [engine.rings for engine in engines] == [[(4, 17)], [], [(4, 17)]]
    await ringer.close()
    for server, _ in servers:
        await server.stop(None)


async def test_a_ring_where_no_engine_is_wakes_nobody(caplog: pytest.LogCaptureFixture) -> None:
    servicer, engine = ShardLinkServer("s", clock), RecordingEngine()
    server, port = await start_link_server(servicer, "127.0.0.1:0")
    ringer = PeerRinger(epoch_of(2, 1, port).members, 2, my_rank=0)
    with caplog.at_level(logging.WARNING):
        await ringer.ring_peers(3)
    servicer.serve(engine, NUM_EMBEDDINGS)
    assert engine.rings == [] and caplog.text == ""
    await ringer.close()
    await server.stop(None)


async def test_a_peer_that_is_gone_is_logged_within_the_deadline(caplog: pytest.LogCaptureFixture) -> None:
    ringer = PeerRinger(epoch_of(1, 1, 1).members, 1, my_rank=0, timeout_s=0.05)
    with caplog.at_level(logging.WARNING):
        await ringer.ring_peers(0)
    assert "ring_failed shard_id=s1 epoch=1 step=0 error=StatusCode.DEADLINE_EXCEEDED" in caplog.text
    await ringer.close()


async def test_a_ring_that_fails_in_any_way_keeps_none_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    engine, servicer = RecordingEngine(), ShardLinkServer("s", clock)
    server, port = await start_link_server(servicer, "127.0.0.1:0")
    servicer.serve(engine, NUM_EMBEDDINGS)
    ringer = PeerRinger(epoch_of(4, 1, port, port).members, 4, my_rank=1)
    await ringer._channels["s0"].close()        # what is called on it then raises no error of a call
    with caplog.at_level(logging.WARNING):
        await ringer.ring_peers(17)
    assert engine.rings == [(4, 17)] and "ring_failed shard_id=s0" in caplog.text
    await ringer.close()
    await server.stop(None)
