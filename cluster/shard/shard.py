"""One shard from its first breath to its last: it prepares, registers, and serves until it is told to stop.

The event loop runs the link, the engine and the reports; the model thread does everything that touches tensors.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from concurrent.futures import ThreadPoolExecutor

from cluster.coordinator.client import CoordinatorApi, ViewFollower
from cluster.device.file_limit import raise_file_limit
from cluster.device.node import NodeIdentity, host_and_port
from cluster.shard.block_exchange import BlockExchange
from cluster.shard.executor import StepCounters
from cluster.shard.heartbeats import Heartbeats
from cluster.shard.parts import ShardParts
from cluster.shard.preparation import Preparation, prepare
from cluster.shard.registered_shard import RegisteredShard
from cluster.shard.work_meter import WorkMeter
from model.transport.endpoint import Endpoint
from serving.config import PoolConfig, ServeConfig
from serving.engine.expert_load import ExpertLoadCounter
from serving.engine.sequence_traces import SequenceTraces
from serving.link.epoch import Member
from serving.link.security import link_security
from serving.link.server import ShardLinkServer, start_link_server
from serving.supervision import first_end, owned_tasks
from serving.tracing.opening import open_tracer


class Shard:
    """Lives as long as `run`; `until_ready` is for whoever waits for it."""

    def __init__(self, config: ServeConfig, pool: PoolConfig, node: NodeIdentity, coordinator: CoordinatorApi) -> None:
        self.shard_id = f"{pool.name}-{secrets.token_hex(4)}"
        self._config = config
        self._pool = pool
        self._node = node
        self._coordinator = coordinator
        self._ready = asyncio.Event()

    async def run(self) -> None:
        """Serve until cancelled; then the group has a moment to go on without this member. Returns when it was
        dismissed. Raises what makes this process useless; then start another."""
        raise_file_limit()
        security = link_security(self._config)
        endpoint = Endpoint(self._node.address)
        heartbeats = Heartbeats(endpoint.address, self._config.group.silence_timeout_s)
        link, blocks = ShardLinkServer(self.shard_id, time.monotonic), BlockExchange(endpoint.address, security)
        server, port = await start_link_server(link, host_and_port(self._node.address, 0), blocks=blocks.sender,
                                               own=endpoint.address, security=security)
        thread = ThreadPoolExecutor(1, "model")
        tracer = open_tracer(self._config.tracing, "shard", self.shard_id, time.monotonic)
        try:
            prepared = await asyncio.get_running_loop().run_in_executor(thread, prepare, self._config, self._pool)
            parts = ShardParts(self._config, self._pool, link, security, endpoint, heartbeats, blocks,
                               thread, ViewFollower(self._coordinator), self._new_counters(prepared),
                               SequenceTraces(tracer, time.monotonic))
            await _until_left(self._registered(parts, prepared, port))
        finally:
            link.stop("the shard stops")
            await server.stop(grace=None)
            endpoint.close()        # whoever waits for this member learns it
            heartbeats.close()
            blocks.close()
            thread.shutdown(wait=False, cancel_futures=True)
            if tracer is not None:
                await tracer.close()

    async def until_ready(self) -> None:
        """Return when the first epoch runs here."""
        await self._ready.wait()

    def _registered(self, parts: ShardParts, prepared: Preparation, port: int) -> RegisteredShard:
        node = self._node
        member = Member(self.shard_id, self._pool.name, node.node_id, node.name, host_and_port(node.address, port),
                        prepared.facts, profile=prepared.profile, endpoint=parts.endpoint.address,
                        heartbeat_port=parts.heartbeats.port, digest=prepared.digest)
        return RegisteredShard(parts, node, member, prepared, self._coordinator, self._ready.set)

    def _new_counters(self, prepared: Preparation) -> StepCounters:
        half_life_s, now_s, args = self._config.placement.load_half_life_s, time.monotonic(), prepared.args
        return StepCounters(ExpertLoadCounter(args.num_moe_layers, args.num_experts, half_life_s, now_s),
                            WorkMeter(prepared.profile, args, half_life_s, now_s))


async def _until_left(shard: RegisteredShard) -> None:
    """Serve until dismissed, or until cancelled and the group goes on without it. Raises what ended it before."""
    is_cancelled = False
    async with owned_tasks(serving=shard.run(), dismissal=shard.until_dismissed()) as tasks:
        try:
            await first_end(tasks.values())
        except asyncio.CancelledError:
            is_cancelled = True
            async with owned_tasks(leaving=shard.leave()) as leaving:
                await first_end((*tasks.values(), *leaving.values()))
    await shard.be_forgotten()
    if is_cancelled:
        raise asyncio.CancelledError
