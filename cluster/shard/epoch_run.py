"""A shard takes part in one epoch: its place in the process group, its engine, its rings."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from cluster.planner.cache_plan import CacheSizes
from cluster.planner.memory_demand import DTYPE_BYTES, max_model_len
from cluster.shard.executor import GroupExecutor, PreparedRevision
from cluster.shard.link_probe import measure_link
from cluster.shard.loaded_model import LoadedModel, new_dispatcher, new_pace, new_runner
from cluster.shard.parts import ShardParts
from cluster.shard.process_group import Meeting, ProcessGroup, choose_backend
from cluster.shard.revision import RevisionFollower, RevisionMaker
from model.dispatch.dispatcher import Dispatcher
from model.errors import GroupError
from model.kernels.protocol import ExpertWeights
from model.memory import kv_block_bytes, state_slot_bytes
from model.placement import Placement
from model.runner import Runner
from model.transport.endpoint import Endpoint
from serving.config import ServeConfig
from serving.engine.engine import Engine
from serving.engine.scheduler import Scheduler
from serving.link.epoch import Epoch, Link
from serving.link.peer_ringer import PeerRinger
from serving.supervision import TaskEndedError, first_end, owned_tasks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JoinedGroup:
    """Holds a member's place in a group that has formed, and what computes there."""

    group: ProcessGroup
    model: LoadedModel
    sizes: CacheSizes
    runner: Runner
    maker: RevisionMaker
    link: Link | None


class EpochRun:
    """Runs a member's engine in the group of one epoch. Made by `join`; `until` steps, `close` leaves the group.

    `revision_changed` is called when there is news of `revisions`.
    """

    def __init__(self, parts: ShardParts, epoch: Epoch, ringer: PeerRinger, joined: JoinedGroup,
                 revision_changed: Callable[[], None]) -> None:
        self.kv_cache_bytes = joined.runner.caches.nbytes
        self.link = joined.link
        self.revisions = RevisionFollower(epoch, joined.model, joined.maker, parts.views, revision_changed)
        self._parts = parts
        self._epoch_number = epoch.number
        self._group = joined.group
        self._ringer = ringer
        self._executor = GroupExecutor(joined.runner, joined.group, parts.thread, epoch, parts.counters,
                                       self._on_switch)
        self.engine = Engine(_new_scheduler(parts.config, joined), self._executor, epoch.number, time.monotonic,
                             ringer.ring_peers, parts.link.deliver)
        self._set_token_budget(epoch)

    @staticmethod
    async def join(parts: ShardParts, epoch: Epoch, rank: int, model: LoadedModel, sizes: CacheSizes,
                   revision_changed: Callable[[], None]) -> EpochRun:
        """Form the group and open the link for routers. Raises GroupError."""
        ringer = PeerRinger(epoch.members, epoch.number, rank)
        ringer.connect()
        try:
            joined = await parts.in_thread(lambda: _join(parts.config, parts.endpoint, epoch, rank, model, sizes))
        except BaseException:
            await ringer.close()
            raise
        run = EpochRun(parts, epoch, ringer, joined, revision_changed)
        parts.link.open_epoch(epoch.number, run.engine)
        return run

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
            self._group.abort()             # it may wait for a member that will never answer
            await self.engine.stop()

    async def close(self) -> None:
        """Leave the group, at once: members that wait for this one in an agreement learn by it that it is gone."""
        self._parts.link.close_epoch(f"epoch {self._epoch_number} is over")
        await self._parts.in_thread(self._group.close)
        await self._ringer.close()
        await self.revisions.close()

    def _on_switch(self, prepared: PreparedRevision, replaced: dict[int, ExpertWeights]) -> None:
        self._set_token_budget(prepared.epoch)
        self.revisions.has_switched(prepared, replaced)

    def _set_token_budget(self, epoch: Epoch) -> None:
        max_batch_tokens = self._parts.config.scheduler.max_batch_tokens
        self.engine.scheduler.token_budget = epoch.token_budget(self._group.rank, max_batch_tokens)


def _new_scheduler(config: ServeConfig, joined: JoinedGroup) -> Scheduler:
    args, dtype_bytes = joined.model.decoder.args, DTYPE_BYTES[config.model.dtype]
    return Scheduler(config.scheduler, joined.sizes.num_blocks, max_model_len(args, config),
                     joined.sizes.num_state_slots, slot_bytes=state_slot_bytes(args, dtype_bytes),
                     block_bytes=kv_block_bytes(args, config.scheduler.block_size, dtype_bytes))


def _join(config: ServeConfig, endpoint: Endpoint, epoch: Epoch, rank: int, model: LoadedModel,
          sizes: CacheSizes) -> JoinedGroup:
    """Join on the model thread, and make what computes in the group."""
    kernels = model.decoder.kernels
    backend = choose_backend(config.group.backend, [member.facts.device for member in epoch.members])
    group = ProcessGroup.join(endpoint, _meeting(epoch), rank, config.group.collective_timeout_s, backend,
                              str(kernels.device))
    try:
        return _in_group(group, config, epoch, model, sizes)
    except BaseException:
        group.close()
        raise


def _meeting(epoch: Epoch) -> Meeting:
    addresses = []
    for member in epoch.members:
        if member.endpoint is None:
            raise GroupError(f"shard {member.shard_id} on node {member.node_name} told no endpoint",
                             fix="run the same version of moesaic everywhere")
        addresses.append(member.endpoint)
    return Meeting(epoch.number, tuple(addresses), epoch.rendezvous)


def _in_group(group: ProcessGroup, config: ServeConfig, epoch: Epoch, model: LoadedModel,
              sizes: CacheSizes) -> JoinedGroup:
    kernels, member = model.decoder.kernels, epoch.members[group.rank]
    known = [member.profile.link if member.profile else None for member in epoch.members]
    # Members of an epoch agree on whether all have measured theirs before.
    link = known[group.rank] if all(known) else measure_link(group, kernels.device)
    pace = new_pace(member, kernels)

    def dispatcher_of(placement: Placement) -> Dispatcher:
        return new_dispatcher(kernels, placement, group, config, pace)
    runner = new_runner(model, dispatcher_of(epoch.placement), sizes, config.scheduler.block_size, pace)
    maker = RevisionMaker(dispatcher_of, member.facts.memory_budget_bytes)
    return JoinedGroup(group, model, sizes, runner, maker, link)
