"""A shard's part in one epoch: its place in the process group, its engine, its rings."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor

from cluster.coordinator.client import ViewFollower
from cluster.planner.cache_plan import CacheSizes
from cluster.planner.memory_demand import DTYPE_BYTES, max_model_len
from cluster.shard.executor import GroupExecutor, PreparedRevision, StepCounters
from cluster.shard.link_probe import measure_link
from cluster.shard.loaded_model import LoadedModel, new_dispatcher, new_pace, new_runner
from cluster.shard.process_group import ProcessGroup
from cluster.shard.revision import RevisionFollower, RevisionMaker
from model.dispatch.dispatcher import Dispatcher
from model.kernels.protocol import ExpertWeights
from model.memory import kv_block_bytes, state_slot_bytes
from model.placement import Placement
from model.runner import Runner
from serving.config import ServeConfig
from serving.engine.engine import Engine
from serving.engine.scheduler import Scheduler
from serving.link.epoch import Epoch, Link
from serving.link.peer_ringer import PeerRinger
from serving.link.server import ShardLinkServer
from serving.supervision import TaskEndedError, first_end, owned_tasks

logger = logging.getLogger(__name__)


class EpochRun:
    """Made for one epoch: join, until, close."""

    def __init__(self, epoch: Epoch, rank: int, config: ServeConfig, link: ShardLinkServer,
                 thread: ThreadPoolExecutor) -> None:
        self.engine: Engine
        self.revisions: RevisionFollower
        self.kv_cache_bytes = 0
        self.link: Link | None = None   # measured when the group has formed
        self._epoch = epoch
        self._rank = rank
        self._config = config
        self._link = link
        self._thread = thread
        self._ringer = PeerRinger(epoch.members, epoch.number, rank)
        self._group: ProcessGroup | None = None
        self._closing = contextlib.AsyncExitStack()

    async def join(self, model: LoadedModel, sizes: CacheSizes, counters: StepCounters, views: ViewFollower,
                   revision_changed: Callable[[], None]) -> None:
        """Form the group and open the link for routers. Raises GroupError.

        `revision_changed` is called when there is news of `revisions`.
        """
        self._ringer.connect()
        loop = asyncio.get_running_loop()
        runner, maker = await loop.run_in_executor(self._thread, self._join, model, sizes)
        assert self._group is not None
        self.revisions = RevisionFollower(self._epoch, model, maker, views, revision_changed)
        self._closing.push_async_callback(self.revisions.close)
        self._executor = GroupExecutor(runner, self._group, self._thread, self._epoch, counters, self._on_switch)
        args, dtype_bytes = model.decoder.args, DTYPE_BYTES[self._config.model.dtype]
        scheduler = Scheduler(self._config.scheduler, sizes.num_blocks, max_model_len(args, self._config),
                              sizes.num_state_slots, slot_bytes=state_slot_bytes(args, dtype_bytes),
                              block_bytes=kv_block_bytes(args, self._config.scheduler.block_size, dtype_bytes))
        self.engine = Engine(scheduler, self._executor, self._epoch.number, time.monotonic, self._ringer.ring_peers,
                             self._link.deliver)
        self._set_token_budget(self._epoch)
        self._link.open_epoch(self._epoch.number, self.engine)

    @property
    def prepared_revision(self) -> int:
        return self._executor.prepared_revision

    async def until(self, is_over: Coroutine[None, None, object]) -> None:
        """Step until the epoch is over. Raises GroupError when the group breaks first."""
        async with owned_tasks(
                engine=self.engine.run(), is_over=is_over,
                revisions=self.revisions.run(self._executor, self.engine.tell_prepared)) as tasks:
            ended = await first_end(tasks.values())
            if ended is not tasks["is_over"]:
                raise TaskEndedError(f"the task {ended.get_name()} returned", fix="see the log for why")
            await self.engine.stop()

    async def close(self) -> None:
        self._link.close_epoch(f"epoch {self._epoch.number} is over")
        await self._ringer.close()
        await self._closing.aclose()
        if self._group is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._group.close)

    def _on_switch(self, prepared: PreparedRevision, replaced: dict[int, ExpertWeights]) -> None:
        self._set_token_budget(prepared.epoch)
        self.revisions.has_switched(prepared, replaced)

    def _set_token_budget(self, epoch: Epoch) -> None:
        max_batch_tokens = self._config.scheduler.max_batch_tokens
        self.engine.scheduler.token_budget = epoch.token_budget(self._rank, max_batch_tokens)

    def _join(self, model: LoadedModel, sizes: CacheSizes) -> tuple[Runner, RevisionMaker]:
        """On the model thread."""
        group_config, kernels = self._config.group, model.decoder.kernels
        self._group = ProcessGroup.join(self._epoch.rendezvous, self._rank, len(self._epoch.members),
                                        group_config.collective_timeout_s, group_config.backend, str(kernels.device))
        known = [member.profile.link if member.profile else None for member in self._epoch.members]
        # Members of an epoch agree on whether all have measured theirs before.
        self.link = known[self._rank] if all(known) else measure_link(self._group, kernels.device)
        group, member = self._group, self._epoch.members[self._rank]
        pace = new_pace(member, kernels)

        def dispatcher_of(placement: Placement) -> Dispatcher:
            return new_dispatcher(kernels, placement, group, self._config, pace)
        runner = new_runner(model, dispatcher_of(self._epoch.placement), sizes, self._config.scheduler.block_size,
                            pace)
        self.kv_cache_bytes = runner.caches.nbytes
        return runner, RevisionMaker(dispatcher_of, member.facts.memory_budget_bytes)
