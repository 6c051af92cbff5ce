"""Who is gone is noticed, on both ends of the link, however it went; and what it had open is no burden then."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serving.link.channel_options import Options, channel_options, server_options
from serving.link.client import ShardLinkClient, SubmissionQueue
from serving.link.server import ShardLinkServer, start_link_server
from tests.serving.link.fake_link import NUM_EMBEDDINGS, Cable, RecordingEngine, RecordingOwner, clock, member
from tests.serving.router.served_shards import Shard, until


@asynccontextmanager
async def link_through(port: int, options: Options | None = None) -> AsyncIterator[RecordingOwner]:
    owner = RecordingOwner()
    link = ShardLinkClient(member(port), lambda: SubmissionQueue("s0", "r", 8, clock), owner, options)
    link.start()
    await owner.changed.until(lambda: owner.num_connected == 1)
    yield owner
    await link.close()


async def test_a_shard_that_is_cut_off_is_noticed() -> None:
    servicer = ShardLinkServer("s0", clock)
    server, port = await start_link_server(servicer, "127.0.0.1:0")
    servicer.serve(RecordingEngine(), NUM_EMBEDDINGS)
    async with Cable(port) as cable, link_through(cable.port, channel_options(0.1, 0.1)) as owner:
        cable.cut()
        await owner.changed.until(lambda: len(owner.errors) == 1)
    await server.stop(None)


async def test_a_router_that_is_cut_off_loses_its_sequences() -> None:
    engine, servicer = RecordingEngine(), ShardLinkServer("s0", clock)
    server, port = await start_link_server(servicer, "127.0.0.1:0", server_options(0.1, 0.1))
    servicer.serve(engine, NUM_EMBEDDINGS)
    async with Cable(port) as cable, link_through(cable.port):
        cable.cut()
        await engine.changed.until(lambda: engine.disconnected == ["r"])
    await server.stop(None)


@asynccontextmanager
async def lone_router(shard: Shard, *arguments: str) -> AsyncIterator[Process]:
    """A router in a process of its own, with three sequences running in the shard."""
    router = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.serving.link.lone_router", str(shard.port), "3", *arguments)
    try:
        await until(lambda: shard.scheduler.num_running == 3)
        yield router
    finally:
        if router.returncode is None:
            router.kill()
        await router.wait()


@asynccontextmanager
async def running_shard(options: Options | None = None) -> AsyncIterator[Shard]:
    shard = Shard(num_blocks=400)
    await shard.start(options)
    yield shard
    await shard.stop()


async def test_a_router_that_is_killed_frees_its_blocks() -> None:
    async with running_shard() as shard, lone_router(shard) as router:
        assert shard.scheduler.blocks.num_free < shard.scheduler.blocks.num_blocks
        router.kill()
        await shard.until_empty()


async def test_a_router_that_is_stopped_is_held_back_and_then_gone() -> None:
    async with running_shard(server_options(0.2, 1.0)) as shard, lone_router(shard) as router:
        router.send_signal(signal.SIGSTOP)
        await until(lambda: shard.scheduler._held_routers == {"lone"})      # by its window: it acknowledges nothing
        await shard.until_empty()
        assert shard.scheduler._held_routers == set()


async def test_the_sequences_of_a_router_that_nobody_misses_end_at_their_deadline() -> None:
    async with running_shard(server_options(600.0, 600.0)) as shard, lone_router(shard, "1.0") as router:
        router.send_signal(signal.SIGSTOP)
        await shard.until_empty()
        assert set(shard.servicer._streams) == {"lone"}
