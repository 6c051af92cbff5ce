"""One process has one of each of these, for all the epochs that it serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from cluster.coordinator.client import ViewFollower
from cluster.shard.executor import StepCounters
from model.transport.endpoint import Endpoint
from serving.config import PoolConfig, ServeConfig
from serving.link.server import ShardLinkServer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ShardParts:
    config: ServeConfig
    pool: PoolConfig
    link: ShardLinkServer
    endpoint: Endpoint
    thread: ThreadPoolExecutor          # the model thread: everything that touches tensors
    views: ViewFollower
    counters: StepCounters

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call it on the model thread."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function)
