"""A shard that the coordinator knows: it serves one epoch after the other, and reports how it is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TypeVar, cast

from cluster.coordinator.client import CoordinatorApi, CoordinatorUnavailableError, Reporter
from cluster.coordinator.reports import HAS_LEFT, IN_EPOCH
from cluster.coordinator.view import ShardState, View
from cluster.device.facts import resident_memory_bytes
from cluster.device.node import NodeIdentity, ReservedPort, host_and_port
from cluster.shard.epoch_run import EpochRun
from cluster.shard.held_engine import GROW_FROM, HeldEngine, hold
from cluster.shard.lifecycle import ShardLifecycle
from cluster.shard.loaded_model import LoadedModel
from cluster.shard.model_keeper import ModelKeeper
from cluster.shard.parts import ShardParts
from cluster.shard.preparation import Preparation
from model.errors import GroupError, ModelError
from model.transport.peer_error import lost_rank
from serving.engine.engine import Engine, ShardLoad
from serving.link.epoch import Epoch, Link, Member, ShardStatus
from serving.supervision import first_end, owned_tasks, run_endless

logger = logging.getLogger(__name__)
T = TypeVar("T")

LOAD_REPORT_S = 5.0
LEAVE_S = 15.0              # for a member that is told to end, before it ends anyway; Serve kills it after 20
_GOODBYE_S = 1.0            # a coordinator that does not answer is gone, or ends with the application
_HEARD_AGAIN_S = 1.0        # after silence, until a member counts as heard
_NOISE_BYTES = 4 << 20      # resident memory that comes and goes is no news


class RegisteredShard:
    """Serves as long as `run`. `on_ready` is called when an epoch runs here."""

    def __init__(self, parts: ShardParts, node: NodeIdentity, member: Member, prepared: Preparation,
                 coordinator: CoordinatorApi, on_ready: Callable[[], None]) -> None:
        self._parts = parts
        self._node = node
        self._member = member           # its facts, link and store address change between epochs
        self._profile = prepared.profile
        self._coordinator = coordinator
        self._on_ready = on_ready
        self._keeper = ModelKeeper(parts.config, prepared.args, prepared.kernels, self._tell_fetch)
        self._store_port = ReservedPort(node.address)       # another for every epoch: see _serve
        self._lifecycle = ShardLifecycle(member.shard_id)
        self._epoch: Epoch | None = None        # the latest that it was in
        self._held: HeldEngine | None = None    # from one epoch to the next
        self._run: EpochRun | None = None       # while an epoch runs
        self._detail = ""
        self._lost_peers: tuple[str, ...] = ()  # who ended its last epoch
        self._ended_s = 0.0
        self._is_leaving = False
        self._is_newcomer = False
        self._reporter = Reporter(self.status, self._send, _is_news)

    async def run(self) -> None:
        """Register, and serve until cancelled. Raises what makes this process useless."""
        self._advance(ShardState.WAITING, "registered")
        try:
            await run_endless(epochs=self._serve_forever(), follower=self._parts.views.run(),
                              reporter=self._reporter.run(), steps=self._report_steps(), orders=self._follow_orders())
        finally:
            self._store_port.close()

    async def leave(self) -> None:
        """Ask that the group goes on without this member, while `run` runs. Returns when it does, when it cannot as all
        are to end, or after a while."""
        self._is_leaving = True
        logger.info("shard_leaves shard_id=%s", self._member.shard_id)
        with contextlib.suppress(CoordinatorUnavailableError, TimeoutError):
            async with asyncio.timeout(LEAVE_S), owned_tasks(
                    may_end=self._parts.views.until(self._may_end), asks=self._ask_to_leave()) as tasks:
                await first_end(tasks.values())

    async def until_dismissed(self) -> None:
        """Return when the group goes on without this member, and its pool is to have fewer: its process is to end."""
        await self._parts.views.until(lambda view: self._member.shard_id in view.dismissed)
        logger.info("shard_dismissed shard_id=%s", self._member.shard_id)

    async def be_forgotten(self) -> None:
        """Tell that this process ends, after `run` has."""
        with contextlib.suppress(CoordinatorUnavailableError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                await self._coordinator.forget_shard(self._member.shard_id)

    def status(self) -> ShardStatus:
        run, model, progress = self._run, self._keeper.model, self._keeper.progress
        engine = self._held.engine if self._held else None
        load = engine.load() if engine else ShardLoad()
        return ShardStatus(
            shard_id=self._member.shard_id, epoch_number=self._epoch.number if self._epoch else 0,
            state=self._lifecycle.state, num_running=load.num_running, num_waiting=load.num_waiting,
            kv_blocks_total=load.kv_blocks_total, kv_blocks_free=load.kv_blocks_free,
            state_slots_total=load.state_slots_total, state_slots_free=load.state_slots_free,
            num_snapshots=load.num_snapshots, num_cached_tokens=load.num_cached_tokens,
            weights_bytes=model.decoder.weights_bytes if model else 0,
            kv_cache_bytes=self._held.caches.nbytes if self._held else 0,
            resident_bytes=resident_memory_bytes(), bytes_read=progress[0], bytes_to_read=progress[1],
            num_steps=engine.num_steps if engine else 0,
            num_tokens_computed=engine.num_tokens_computed if engine else 0,
            num_expert_rows=engine.num_expert_rows if engine else 0,
            num_expert_copies=model.num_expert_copies if model else 0,
            revision=engine.revision if run and engine else 0, prepared_revision=run.prepared_revision if run else 0,
            failed_revision=run.revisions.failed_revision if run else 0,
            detail=(run.revisions.detail if run else "") or self._detail, is_leaving=self._is_leaving,
            is_newcomer=self._is_newcomer and self._lifecycle.state in IN_EPOCH, lost_peers=self._lost_now())

    def _lost_now(self) -> tuple[str, ...]:
        """Return who of the epoch that it has left ended it, until it could be heard again, and who is silent."""
        if self._epoch is None or self._lifecycle.state not in HAS_LEFT:
            return ()
        silent = self._parts.silent_members(self._epoch)
        is_old = time.monotonic() - self._ended_s > self._parts.config.group.silence_timeout_s + _HEARD_AGAIN_S
        return silent if is_old else tuple(sorted({*self._lost_peers, *silent}))

    async def _ask_to_leave(self) -> None:
        """Raises CoordinatorUnavailableError or TimeoutError when nobody is there to ask."""
        while True:
            async with asyncio.timeout(_GOODBYE_S):
                await self._send(self.status())
            await asyncio.sleep(_GOODBYE_S)

    async def _follow_orders(self) -> None:
        """Remember that it was told to go, for a coordinator that restarts."""
        while True:
            await self._parts.views.until(lambda view: not self._is_leaving and self._member.shard_id in view.leaving)
            self._is_leaving = True
            self._reporter.notify()

    def _may_end(self, view: View) -> bool:
        """Return whether nobody of the group waits for this member, or all are to end."""
        epoch = view.epoch
        if epoch is None or epoch.rank_of(self._member.shard_id) is None:
            return True
        return all(member.shard_id in view.leaving for member in epoch.members)

    # One epoch after the other.

    async def _serve_forever(self) -> None:
        while True:
            epoch, rank = await self._parts.views.first(self._next_epoch)
            if rank is None:
                await self._release_engine("the group goes on without this member")
                self._advance(ShardState.WAITING, self._detail)
                continue
            self._detail, self._lost_peers = await self._why_ended(epoch, rank)
            self._ended_s = time.monotonic()
            self._advance(ShardState.BROKEN if self._held else ShardState.WAITING, self._detail)

    async def _why_ended(self, epoch: Epoch, rank: int) -> tuple[str, tuple[str, ...]]:
        """Serve an epoch to its end -> why it ended, and which members did that."""
        try:
            await self._serve(epoch, rank)
        except GroupError as error:
            lost, silent = lost_rank(error), self._parts.silent_members(epoch)
            return str(error), silent if lost is None else tuple({epoch.members[lost].shard_id, *silent})
        except ModelError as error:
            await self._fail(error)
            raise
        return "the epoch has ended", ()

    async def _serve(self, epoch: Epoch, rank: int) -> None:
        """Load, join and step, until the epoch is over. Raises GroupError when the group breaks."""
        parts, self._epoch = self._parts, epoch
        running = parts.views.view.epoch
        self._is_newcomer = running is None or running.number < epoch.number
        parts.watch(epoch)
        self._reserve_store_port()
        self._advance(ShardState.LOADING, f"epoch {epoch.number}, rank {rank}")
        if self._held is not None and self._held.model.takes_requests != epoch.takes_requests(rank):
            await self._release_engine("its role changes")
        loaded = await self._unless_over(epoch, self._load(epoch, rank))
        if loaded is None:
            return
        self._advance(ShardState.LOADED, "weights are loaded")
        complete = await self._unless_over(epoch, parts.views.first(
            lambda view: view.epoch if view.joins(epoch.number) else None))
        if complete is None:
            return
        (model, held), self._epoch = loaded, complete       # it says where to meet
        self._is_newcomer = False
        self._advance(ShardState.JOINING, "all members have loaded")
        run = await EpochRun.join(parts, complete, rank, model, held, self._note_revision)
        try:
            engine = self._enter(run, held, complete)
            self._advance(ShardState.READY, "the group is formed")
            self._on_ready()
            await run.until(engine, parts.views.until(lambda view: view.has_ended(epoch.number)))
        finally:
            self._run = None
            await run.close()

    async def _unless_over(self, epoch: Epoch, work: Coroutine[None, None, T]) -> T | None:
        """Return what comes of the work, None when the epoch is over before; what of it runs on the model thread comes
        to its end there. Raises GroupError when a member of the epoch falls silent meanwhile."""
        number, parts = epoch.number, self._parts
        over = parts.views.until(lambda view: view.has_ended(number) or view.has_withdrawn(number))
        async with owned_tasks(work=work, over=over, silent=parts.until_silent(epoch)) as tasks:
            ended = await first_end((tasks["over"], tasks["work"], tasks["silent"]))
            return cast("T", ended.result()) if ended is tasks["work"] else None

    async def _load(self, epoch: Epoch, rank: int) -> tuple[LoadedModel, HeldEngine]:
        """Make the weights those of the epoch, beside the engine that this member holds."""
        parts, held = self._parts, self._held
        await parts.in_thread(lambda: None)     # what was begun for an epoch that ended meanwhile is done first
        num_blocks = 0 if held is None else held.blocks_in(parts.pool, epoch, rank)
        if held is not None and num_blocks < held.sizes.num_blocks:
            await self._resize(held, num_blocks)
        model = await parts.in_thread(lambda: self._keeper.take(epoch, rank))
        if held is None:
            held = self._held = await parts.in_thread(lambda: hold(parts.config, parts.pool, model, epoch, rank))
        elif num_blocks >= GROW_FROM * held.sizes.num_blocks:
            await self._resize(held, num_blocks)
        return model, held

    def _enter(self, run: EpochRun, held: HeldEngine, epoch: Epoch) -> Engine:
        self._note_link(run.link)
        is_new = held.engine is None
        engine = held.enter(epoch.number, run.executor, run.ringer.ring_peers, self._parts.link.deliver)
        self._parts.blocks.enter(epoch, self._member.shard_id, engine, held.caches)
        if is_new:
            engine.traces = self._parts.traces
            self._parts.link.serve(engine, held.model.decoder.args.vocab_size)
        self._run = run
        return engine

    async def _resize(self, held: HeldEngine, num_blocks: int) -> None:
        transfers = held.engine.transfers if held.engine else None
        if transfers is not None:
            await transfers.close()
        try:
            await self._parts.in_thread(lambda: held.resize(num_blocks))
        finally:
            if transfers is not None:
                transfers.open()

    async def _release_engine(self, why: str) -> None:
        """Give sequences and caches up; routers place their sequences elsewhere. Weights stay."""
        self._parts.link.stop(why)
        self._parts.blocks.leave()
        self._held, self._detail = None, why
        facts = await self._parts.in_thread(lambda: self._keeper.release_engine(self._member.facts))
        self._member = replace(self._member, facts=facts)

    def _next_epoch(self, view: View) -> tuple[Epoch, int | None] | None:
        """Take an epoch that this shard has yet to serve, and its rank there; None for one that leaves it out while it
        holds an engine."""
        for epoch in (view.epoch, view.coming):
            if epoch is None or (self._epoch is not None and epoch.number <= self._epoch.number):
                continue
            rank = epoch.rank_of(self._member.shard_id)
            if rank is not None:
                return epoch, rank
            if epoch is view.epoch and self._held is not None:
                return epoch, None
        return None

    def _reserve_store_port(self) -> None:
        """Take another port: a store that opens again where an older one was meets clients of the older one."""
        self._store_port.close()
        self._store_port = ReservedPort(self._node.address)
        self._member = replace(self._member, store_address=host_and_port(self._node.address, self._store_port.port))

    # News.

    def _advance(self, to: ShardState, why: str) -> None:
        self._lifecycle.advance(to, why)
        self._reporter.notify()

    def _note_revision(self) -> None:
        if self._run is not None:
            self._epoch, self._keeper.model = self._run.revisions.epoch, self._run.revisions.model
        self._reporter.notify()

    def _note_link(self, link: Link | None) -> None:
        if link is not None:
            self._member = replace(self._member, profile=replace(self._profile, link=link))

    def _tell_fetch(self, line: str) -> None:
        """Show in the status how far the checkpoint is, while it is fetched. Called on the model thread."""
        if line:
            logger.info("checkpoint shard_id=%s %s", self._member.shard_id, line)
        self._detail = line

    async def _fail(self, error: ModelError) -> None:
        """Tell the coordinator why, once, at once: this process ends."""
        self._detail = str(error)
        self._advance(ShardState.FAILED, self._detail)
        with contextlib.suppress(CoordinatorUnavailableError):
            await self._coordinator.report(self._member, self.status())

    async def _send(self, status: ShardStatus) -> None:
        if await self._coordinator.report(self._member, status):
            await self._coordinator.report(self._member, status, self._epoch, self._parts.views.remembered)

    async def _report_steps(self) -> None:
        """Report the load of the experts, and the work, now and then when steps have been made since."""
        counters, num_reported = self._parts.counters, 0
        while True:
            await asyncio.sleep(LOAD_REPORT_S)
            num_steps = counters.loads.num_steps
            if num_steps != num_reported:
                with contextlib.suppress(CoordinatorUnavailableError):
                    now_s = time.monotonic()
                    await self._coordinator.report_expert_load(
                        self._member.shard_id, counters.loads.snapshot(now_s), counters.work.snapshot(now_s))
                    num_reported = num_steps


def _is_news(status: ShardStatus, sent: ShardStatus) -> bool:
    return (replace(status, resident_bytes=sent.resident_bytes) != sent
            or abs(status.resident_bytes - sent.resident_bytes) > _NOISE_BYTES)
