"""A shard takes part in one epoch: its place in the process group, its rings, its revisions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

from cluster.device.host_limits import host_cpus
from cluster.shard.executor import GroupExecutor, PreparedRevision
from cluster.shard.held_engine import HeldEngine
from cluster.shard.link_probe import measure_link
from cluster.shard.loaded_model import LoadedModel, new_dispatcher
from cluster.shard.parts import ShardParts
from cluster.shard.process_group import Meeting, ProcessGroup, choose_backend
from cluster.shard.revision import RevisionFollower, RevisionMaker
from cluster.shard.shared_host import host_threads
from model.dispatch.dispatcher import Dispatcher
from model.errors import GroupError
from model.kernels.protocol import ExpertWeights
from model.placement import Placement
from model.runner import Runner
from model.transport.endpoint import Endpoint
from serving.config import ServeConfig
from serving.engine.engine import Engine
from serving.link.epoch import Epoch, Link, Member
from serving.link.peer_ringer import PeerRinger
from serving.supervision import TaskEndedError, first_end, owned_tasks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JoinedGroup:
    """Holds a member's place in a group that has formed, and what computes there."""

    group: ProcessGroup
    model: LoadedModel
    runner: Runner
    maker: RevisionMaker
    link: Link | None


class EpochRun:
    """Runs a member's engine in the group of one epoch. Made by `join`; `until` steps, `close` leaves the group.

    `revision_changed` is called when there is news of `revisions`.
    """

    def __init__(self, parts: ShardParts, epoch: Epoch, ringer: PeerRinger, joined: JoinedGroup,
                 revision_changed: Callable[[], None]) -> None:
        self.link = joined.link
        self.revisions = RevisionFollower(epoch, joined.model, joined.maker, parts.views, revision_changed)
        self.executor = GroupExecutor(joined.runner, joined.group, parts.thread, epoch, parts.counters,
                                      self._on_switch)
        self.ringer = ringer
        self._parts = parts
        self._epoch = epoch
        self._group = joined.group
        self._engine: Engine | None = None

    @staticmethod
    async def join(parts: ShardParts, epoch: Epoch, rank: int, model: LoadedModel, held: HeldEngine,
                   revision_changed: Callable[[], None]) -> EpochRun:
        """Form the group. Raises GroupError, also when the epoch is over before it has formed."""
        ringer = PeerRinger(epoch.members, epoch.number, rank, security=parts.security)
        ringer.connect()
        try:
            async with owned_tasks(over=_abort_when_over(parts, epoch), silent=parts.until_silent(epoch)):
                joined = await parts.in_thread(lambda: _join(parts.config, parts.endpoint, epoch, rank, model, held))
        except BaseException:
            await ringer.close()
            raise
        return EpochRun(parts, epoch, ringer, joined, revision_changed)

    @property
    def prepared_revision(self) -> int:
        return self.executor.prepared_revision

    async def until(self, engine: Engine, is_over: Coroutine[None, None, object]) -> None:
        """Step until the epoch is over. Raises GroupError when the group breaks first: then nothing of the step that
        broke is done, and the engine is as it was before."""
        self._engine = engine
        self._set_token_budget(self._epoch)
        async with owned_tasks(
                engine=engine.run(), is_over=is_over, lost=self._parts.until_lost(self._group),
                silent=self._parts.until_silent(self._epoch),
                revisions=self.revisions.run(self.executor, engine.tell_prepared)) as tasks:
            try:
                ended = await first_end(tasks.values())
            except GroupError:
                self._group.abort()
                await engine.stop()
                raise
            if ended is not tasks["is_over"]:
                raise TaskEndedError(f"the task {ended.get_name()} returned", fix="see the log for why")
            self._group.abort()             # it may wait for a member that will never answer
            await engine.stop()

    async def close(self) -> None:
        """Leave the group, at once: members that wait for this one in an agreement learn by it that it is gone."""
        await self._parts.in_thread(self._group.close)
        await self.ringer.close()
        await self.revisions.close()

    def _on_switch(self, prepared: PreparedRevision, replaced: dict[int, ExpertWeights]) -> None:
        self._set_token_budget(prepared.epoch)
        self.revisions.has_switched(prepared, replaced)

    def _set_token_budget(self, epoch: Epoch) -> None:
        assert self._engine is not None
        max_batch_tokens = self._parts.config.scheduler.max_batch_tokens
        self._engine.scheduler.token_budget = epoch.token_budget(self._group.rank, max_batch_tokens)


async def _abort_when_over(parts: ShardParts, epoch: Epoch) -> None:
    await parts.views.until(lambda view: view.has_ended(epoch.number))
    parts.endpoint.abort_groups(epoch.number)


def _join(config: ServeConfig, endpoint: Endpoint, epoch: Epoch, rank: int, model: LoadedModel,
          held: HeldEngine) -> JoinedGroup:
    """Join on the model thread, and make what computes in the group."""
    kernels = model.decoder.kernels
    backend = choose_backend(config.group.backend, [member.facts.device for member in epoch.members])
    group = ProcessGroup.join(endpoint, _meeting(epoch), rank, config.group.collective_timeout_s, backend,
                              str(kernels.device))
    try:
        return _in_group(group, config, epoch, model, held)
    except BaseException:
        group.close()
        raise


def known_link(members: Sequence[Member], rank: int) -> Link | None:
    """Return a member's link without measuring it; None for all members alike, when none of them has measured.

    Who joins others that have takes the slowest of theirs: a measurement would hold up all streams for long.
    """
    links = [member.profile.link if member.profile else None for member in members]
    known = [link for link in links if link is not None]
    return links[rank] or max(known, key=lambda link: (link.latency_s, -link.bytes_per_s), default=None)


def _meeting(epoch: Epoch) -> Meeting:
    addresses = []
    for member in epoch.members:
        if member.endpoint is None:
            raise GroupError(f"shard {member.shard_id} on node {member.node_name} told no endpoint",
                             fix="run the same version of moesaic everywhere")
        addresses.append(member.endpoint)
    return Meeting(epoch.number, tuple(addresses), epoch.rendezvous)


def _in_group(group: ProcessGroup, config: ServeConfig, epoch: Epoch, model: LoadedModel,
              held: HeldEngine) -> JoinedGroup:
    kernels, member = model.decoder.kernels, epoch.members[group.rank]
    link = known_link(epoch.members, group.rank) or measure_link(group, kernels.device)
    threads = host_threads(epoch.members, group.rank, host_cpus().num_cpus)

    def dispatcher_of(placement: Placement) -> Dispatcher:
        return new_dispatcher(kernels, placement, group, config, held.pace, threads)
    held.runner.dispatcher = dispatcher_of(epoch.placement)
    maker = RevisionMaker(dispatcher_of, member.facts.memory_budget_bytes)
    return JoinedGroup(group, model, held.runner, maker, link)
