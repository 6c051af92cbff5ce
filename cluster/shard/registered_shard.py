"""A shard that the coordinator knows: it serves one epoch after the other, and reports how it is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from cluster.coordinator.client import CoordinatorApi, CoordinatorUnavailableError, Reporter
from cluster.coordinator.view import GroupPhase, ShardState, View
from cluster.device.facts import resident_memory_bytes
from cluster.device.node import NodeIdentity, ReservedPort, host_and_port
from cluster.shard.epoch_run import EpochRun
from cluster.shard.lifecycle import ShardLifecycle
from cluster.shard.loaded_model import cache_sizes
from cluster.shard.model_keeper import ModelKeeper
from cluster.shard.parts import ShardParts
from cluster.shard.preparation import Preparation
from model.errors import GroupError, ModelError
from serving.engine.engine import ShardLoad
from serving.link.epoch import Epoch, Link, Member, ShardStatus
from serving.supervision import run_endless

logger = logging.getLogger(__name__)

LOAD_REPORT_S = 5.0
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
        self._run: EpochRun | None = None       # while an epoch runs
        self._detail = ""
        self._reporter = Reporter(self.status, self._send, _is_news)

    async def run(self) -> None:
        """Register, and serve until cancelled. Raises what makes this process useless."""
        self._advance(ShardState.WAITING, "registered")
        try:
            await run_endless(epochs=self._serve_forever(), follower=self._parts.views.run(),
                              reporter=self._reporter.run(), steps=self._report_steps())
        finally:
            self._store_port.close()

    def status(self) -> ShardStatus:
        run, model, progress = self._run, self._keeper.model, self._keeper.progress
        load = run.engine.load() if run else ShardLoad()
        return ShardStatus(
            shard_id=self._member.shard_id, epoch_number=self._epoch.number if self._epoch else 0,
            state=self._lifecycle.state, num_running=load.num_running, num_waiting=load.num_waiting,
            kv_blocks_total=load.kv_blocks_total, kv_blocks_free=load.kv_blocks_free,
            state_slots_total=load.state_slots_total, state_slots_free=load.state_slots_free,
            num_snapshots=load.num_snapshots, num_cached_tokens=load.num_cached_tokens,
            weights_bytes=model.decoder.weights_bytes if model else 0, kv_cache_bytes=run.kv_cache_bytes if run else 0,
            resident_bytes=resident_memory_bytes(), bytes_read=progress[0], bytes_to_read=progress[1],
            num_steps=run.engine.num_steps if run else 0,
            num_tokens_computed=run.engine.num_tokens_computed if run else 0,
            num_expert_rows=run.engine.num_expert_rows if run else 0,
            num_expert_copies=model.num_expert_copies if model else 0,
            revision=run.engine.revision if run else 0, prepared_revision=run.prepared_revision if run else 0,
            failed_revision=run.revisions.failed_revision if run else 0,
            detail=(run.revisions.detail if run else "") or self._detail)

    # One epoch after the other.

    async def _serve_forever(self) -> None:
        while True:
            epoch, rank = await self._parts.views.first(self._next_epoch)
            why = await self._why_ended(epoch, rank)
            facts = await self._parts.in_thread(lambda: self._keeper.release_engine(self._member.facts))
            self._member = replace(self._member, facts=facts)
            self._detail = why
            self._advance(ShardState.WAITING, why)

    async def _why_ended(self, epoch: Epoch, rank: int) -> str:
        """Serve an epoch to its end. Nothing that it returns or leaves holds on to the engine."""
        try:
            await self._serve(epoch, rank)
        except GroupError as error:
            return str(error)
        except ModelError as error:
            await self._fail(error)
            raise
        return "the epoch has ended"

    async def _serve(self, epoch: Epoch, rank: int) -> None:
        """Load, join and step, until the epoch is over. Raises GroupError when the group breaks."""
        parts, self._epoch = self._parts, epoch
        self._reserve_store_port()
        self._advance(ShardState.LOADING, f"epoch {epoch.number}, rank {rank}")
        model = await parts.in_thread(lambda: self._keeper.take(epoch, rank))
        sizes = await parts.in_thread(lambda: cache_sizes(
            parts.config, parts.pool, model, epoch.members[rank].facts.memory_budget_bytes, len(epoch.members)))
        self._advance(ShardState.LOADED, "weights are loaded")
        view = await parts.views.until(
            lambda view: view.has_ended(epoch.number) or view.phase in (GroupPhase.JOINING, GroupPhase.READY))
        if view.epoch is None or view.has_ended(epoch.number):
            return
        self._epoch = complete = view.epoch         # it says where to meet
        self._advance(ShardState.JOINING, "all members have loaded")
        run = await EpochRun.join(parts, complete, rank, model, sizes, self._note_revision)
        try:
            self._note_link(run.link)
            self._run = run
            self._advance(ShardState.READY, "the group is formed")
            self._on_ready()
            await run.until(parts.views.until(lambda view: view.has_ended(epoch.number)))
        finally:
            self._run = None
            await run.close()

    def _next_epoch(self, view: View) -> tuple[Epoch, int] | None:
        """Take an epoch that this shard has yet to serve, and its rank there."""
        if view.epoch is None or (self._epoch is not None and view.epoch.number <= self._epoch.number):
            return None
        rank = view.epoch.rank_of(self._member.shard_id)
        return None if rank is None else (view.epoch, rank)

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
            await self._coordinator.report(self._member, status, self._epoch)

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
