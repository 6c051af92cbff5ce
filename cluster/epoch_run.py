"""A shard's part in one epoch: its place in the process group, its engine, its rings."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor

from cluster.executor import GroupExecutor
from cluster.link_probe import measure_link
from cluster.loaded_model import LoadedModel, new_dispatcher, new_pace, new_runner
from cluster.memory_demand import max_model_len
from cluster.process_group import ProcessGroup
from serving.config import ServeConfig
from serving.engine import Engine
from serving.epoch import Epoch, Link
from serving.peer_ringer import PeerRinger
from serving.scheduler import Scheduler
from serving.shard_link_server import ShardLinkServer

logger = logging.getLogger(__name__)


class EpochRun:
    """Made for one epoch: join, until, close."""

    def __init__(self, epoch: Epoch, rank: int, config: ServeConfig, link: ShardLinkServer,
                 thread: ThreadPoolExecutor) -> None:
        self.engine: Engine
        self.kv_cache_bytes = 0
        self.link: Link | None = None   # measured when the group has formed
        self._epoch = epoch
        self._rank = rank
        self._config = config
        self._link = link
        self._thread = thread
        self._ringer = PeerRinger(epoch.members, epoch.number, rank)
        self._group: ProcessGroup | None = None

    async def join(self, model: LoadedModel, num_blocks: int) -> None:
        """Form the group and open the link for routers. Raises GroupError."""
        self._ringer.connect()
        loop = asyncio.get_running_loop()
        executor = await loop.run_in_executor(self._thread, self._join, model, num_blocks)
        scheduler = Scheduler(self._config.scheduler, num_blocks, max_model_len(model.decoder.args, self._config))
        self.engine = Engine(scheduler, executor, self._epoch.number, time.monotonic, self._ringer.ring_peers,
                             self._link.deliver)
        self._link.open_epoch(self._epoch.number, self.engine)

    async def until(self, is_over: Coroutine[None, None, object]) -> None:
        """Step until the epoch is over. Raises GroupError when the group breaks first."""
        engine_task = asyncio.create_task(self.engine.run())
        over_task = asyncio.create_task(is_over)
        try:
            await asyncio.wait((engine_task, over_task), return_when=asyncio.FIRST_COMPLETED)
            if engine_task.done():
                await engine_task
            await self.engine.stop()
        finally:
            for task in (engine_task, over_task):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def close(self) -> None:
        self._link.close_epoch(f"epoch {self._epoch.number} is over")
        await self._ringer.close()
        if self._group is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._group.close)

    def _join(self, model: LoadedModel, num_blocks: int) -> GroupExecutor:
        """On the model thread."""
        group_config, kernels = self._config.group, model.decoder.kernels
        self._group = ProcessGroup.join(self._epoch.rendezvous, self._rank, len(self._epoch.members),
                                        group_config.collective_timeout_s, group_config.backend, str(kernels.device))
        self.link = measure_link(self._group, kernels.device)
        pace = new_pace(self._epoch.members[self._rank], kernels)
        dispatcher = new_dispatcher(kernels, self._epoch.placement, self._group, self._config, pace)
        runner = new_runner(model, dispatcher, num_blocks, self._config.scheduler.block_size, pace)
        self.kv_cache_bytes = runner.kv_cache.nbytes
        return GroupExecutor(runner, self._group, self._thread)
