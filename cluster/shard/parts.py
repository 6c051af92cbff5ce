"""One process has one of each of these, for all the epochs that it serves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from cluster.coordinator.client import ViewFollower
from cluster.shard.block_exchange import BlockExchange
from cluster.shard.executor import StepCounters
from cluster.shard.heartbeats import Heartbeats
from cluster.shard.process_group import ProcessGroup
from model.errors import GroupError
from model.transport.endpoint import Endpoint
from serving.config import PoolConfig, ServeConfig
from serving.engine.sequence_traces import SequenceTraces
from serving.link.epoch import Epoch
from serving.link.security import LinkSecurity
from serving.link.server import ShardLinkServer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ShardParts:
    config: ServeConfig
    pool: PoolConfig
    link: ShardLinkServer
    security: LinkSecurity
    endpoint: Endpoint
    heartbeats: Heartbeats
    blocks: BlockExchange
    thread: ThreadPoolExecutor          # the model thread: everything that touches tensors
    views: ViewFollower
    counters: StepCounters
    traces: SequenceTraces

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call it on the model thread."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function)

    def watch(self, epoch: Epoch) -> None:
        """Ask that epoch's members for heartbeats, and nobody else."""
        self.heartbeats.watch((member.endpoint, member.heartbeat_port) for member in epoch.members if member.endpoint)

    def silent_members(self, epoch: Epoch) -> tuple[str, ...]:
        """Return the shard ids of those members that do not answer heartbeats any more."""
        silent = self.heartbeats.silent()
        return tuple(member.shard_id for member in epoch.members
                     if member.endpoint and member.endpoint.peer_id in silent)

    async def until_lost(self, group: ProcessGroup) -> None:
        """Raise PeerError when the connection with a member of the group ends, at once also while nothing runs."""
        while True:
            group.check()
            await _readable(self.endpoint.hangups.fileno())
            self.endpoint.hangups.poll(0)

    async def until_silent(self, epoch: Epoch) -> None:
        """Raise GroupError when a member of the epoch does not answer heartbeats any more; what waits for it ends."""
        while not (silent := self.silent_members(epoch)):
            await _readable(self.heartbeats.news)
            os.eventfd_read(self.heartbeats.news)
        self.endpoint.abort_groups(epoch.number)
        limit_s = self.config.group.silence_timeout_s
        raise GroupError(f"{', '.join(silent)} did not answer heartbeats for {limit_s:g} s",
                         fix="look at those processes and their nodes; raise group.silence_timeout_s if they were slow")


async def _readable(fd: int) -> None:
    """Return when there is something to be read. One at a time waits for it."""
    loop, is_readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, is_readable.set)
    try:
        await is_readable.wait()
    finally:
        loop.remove_reader(fd)
