"""One shard from its first breath to its last: it registers, and serves one epoch after the other.

The event loop runs the link, the engine and the reports; the model thread does everything that touches tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch

from cluster.coordinator.client import CoordinatorApi, CoordinatorUnavailableError, Reporter, ViewFollower
from cluster.coordinator.view import GroupPhase, ShardState, View
from cluster.device.backend import import_backend
from cluster.device.facts import measure_device, num_threads_of, resident_memory_bytes, return_free_memory
from cluster.device.file_limit import raise_file_limit
from cluster.device.model_store import locate_checkpoint
from cluster.device.node import NodeIdentity, ReservedPort, host_and_port
from cluster.device.profile import profile_device
from cluster.device.profile_store import ProfileStore, default_profile_dir
from cluster.shard.epoch_run import EpochRun
from cluster.shard.executor import StepCounters
from cluster.shard.lifecycle import ShardLifecycle
from cluster.shard.loaded_model import LoadedModel, cache_sizes, load_model
from cluster.shard.work_meter import WorkMeter
from model.args import ModelArgs, read_model_args
from model.errors import GroupError, ModelError
from model.kernels.protocol import Kernels
from model.kernels.select import select_kernels
from model.weights import WeightLoader
from serving.config import PoolConfig, ServeConfig
from serving.engine.engine import ShardLoad
from serving.engine.expert_load import ExpertLoadCounter
from serving.link.epoch import DeviceProfile, Epoch, Link, Member, ShardStatus
from serving.link.server import ShardLinkServer, start_link_server
from serving.supervision import run_endless

logger = logging.getLogger(__name__)

LOAD_REPORT_S = 5.0
_NOISE_BYTES = 4 << 20      # resident memory that comes and goes is no news
T = TypeVar("T")


class Shard:
    """`run` is everything; `until_ready` and `failure` are for whoever supervises it."""

    def __init__(self, config: ServeConfig, pool: PoolConfig, node: NodeIdentity, coordinator: CoordinatorApi) -> None:
        self.shard_id = f"{pool.name}-{secrets.token_hex(4)}"
        self._config = config
        self._pool = pool
        self._node = node
        self._coordinator = coordinator
        self._follower = ViewFollower(coordinator)
        self._lifecycle = ShardLifecycle(self.shard_id)
        self._link = ShardLinkServer(time.monotonic)
        self._thread = ThreadPoolExecutor(1, "model", torch.set_num_threads, (num_threads_of(pool),))
        self._store_port = ReservedPort(node.address)       # another for every epoch: see _serve
        self._member: Member | None = None
        self._epoch: Epoch | None = None
        self._model: LoadedModel | None = None
        self._run: EpochRun | None = None
        self._counters: StepCounters
        self._progress = (0, 0)         # bytes read, bytes to read
        self._detail = ""
        self._reporter = Reporter(self.status, self._send, _is_news)
        self._ready = asyncio.Event()

    async def run(self) -> None:
        """Serve until cancelled. Raises what makes this process useless; then start another."""
        raise_file_limit()
        server, port = await start_link_server(self._link, host_and_port(self._node.address, 0))
        try:
            kernels, args, profile = await self._in_thread(self._prepare)
            self._counters = self._new_counters(args, profile)
            facts = await self._in_thread(lambda: measure_device(
                self._pool, kernels.name, self._config.num_shards_a_machine))
            self._member = Member(self.shard_id, self._pool.name, self._node.node_id, self._node.name,
                                  host_and_port(self._node.address, port), facts, profile=profile)
            self._advance(ShardState.WAITING, "registered")
            await run_endless(epochs=self._serve_forever(kernels, args), follower=self._follower.run(),
                              reporter=self._reporter.run(), steps=self._report_steps())
        finally:
            self._link.close_epoch("the shard stops")
            await server.stop(grace=None)
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._store_port.close()

    async def until_ready(self) -> None:
        """The first epoch runs here."""
        await self._ready.wait()

    def _prepare(self) -> tuple[Kernels, ModelArgs, DeviceProfile]:
        """Import, read and measure what registration needs. On the model thread, because it takes seconds."""
        device = "cpu" if self._pool.device == "cpu" else "cuda:0"
        import_backend(device)
        kernels = select_kernels(device)
        folder = locate_checkpoint(self._config.model, "facts")
        args = read_model_args(folder)
        store = ProfileStore(default_profile_dir())
        gc.freeze()     # to look through what imports leave takes a tenth of a second each time
        return kernels, args, profile_device(args, self._config.model.dtype, kernels, self._pool, store)

    def _new_counters(self, args: ModelArgs, profile: DeviceProfile) -> StepCounters:
        half_life_s, now_s = self._config.placement.load_half_life_s, time.monotonic()
        return StepCounters(ExpertLoadCounter(args.num_moe_layers, args.num_experts, half_life_s, now_s),
                            WorkMeter(profile, args, half_life_s, now_s))

    async def _serve_forever(self, kernels: Kernels, args: ModelArgs) -> None:
        while True:
            epoch = (await self._follower.until(self._is_mine_and_new)).epoch
            assert epoch is not None
            self._epoch = epoch
            try:
                await self._serve(epoch, kernels, args)
                why = "the epoch has ended"
            except GroupError as error:
                why = str(error)
            except ModelError as error:
                await self._fail(error)
                raise
            self._detail = why
            self._advance(ShardState.WAITING, why)

    def _is_mine_and_new(self, view: View) -> bool:
        return (view.epoch is not None and view.epoch.number > (self._epoch.number if self._epoch else 0)
                and view.epoch.rank_of(self.shard_id) is not None)

    async def _serve(self, epoch: Epoch, kernels: Kernels, args: ModelArgs) -> None:
        """Load, join and step, until the epoch is over. Raises GroupError when the group breaks."""
        rank = epoch.rank_of(self.shard_id)
        assert rank is not None and self._member is not None
        self._reserve_store_port()
        self._advance(ShardState.LOADING, f"epoch {epoch.number}, rank {rank}")
        model = await self._load(epoch, rank, kernels, args)
        budget_bytes, num_members = epoch.members[rank].facts.memory_budget_bytes, len(epoch.members)
        sizes = await self._in_thread(lambda: cache_sizes(
            self._config, self._pool, model, budget_bytes, num_members))
        self._advance(ShardState.LOADED, "weights are loaded")
        view = await self._follower.until(
            lambda view: view.has_ended(epoch.number) or view.phase in (GroupPhase.JOINING, GroupPhase.READY))
        if view.has_ended(epoch.number):
            return
        assert view.epoch is not None
        self._epoch = epoch = view.epoch        # complete: it says where to meet
        self._advance(ShardState.JOINING, "all members have loaded")
        run = EpochRun(epoch, rank, self._config, self._link, self._thread)
        try:
            await run.join(model, sizes, self._counters, self._follower, self._note_revision)
            self._note_link(run.link)
            self._run = run
            self._advance(ShardState.READY, "the group is formed")
            self._ready.set()
            await run.until(self._follower.until(lambda view: view.has_ended(epoch.number)))
        finally:
            self._run = None
            await run.close()

    def _note_revision(self) -> None:
        if self._run is not None:
            self._epoch, self._model = self._run.revisions.epoch, self._run.revisions.model
        self._reporter.notify()

    def _note_link(self, link: Link | None) -> None:
        assert self._member is not None and self._member.profile is not None
        if link is not None:
            self._member = replace(self._member, profile=replace(self._member.profile, link=link))

    def _reserve_store_port(self) -> None:
        """A store that opens again where an older one was meets clients of the older one."""
        assert self._member is not None
        self._store_port.close()
        self._store_port = ReservedPort(self._node.address)
        self._member = replace(self._member, store_address=host_and_port(self._node.address, self._store_port.port))

    async def _load(self, epoch: Epoch, rank: int, kernels: Kernels, args: ModelArgs) -> LoadedModel:
        if self._model is not None and self._model.holds(epoch, rank):
            return self._model
        self._model = None          # two would not fit

        def note(num_done: int, num_total: int) -> None:
            self._progress = (num_done, num_total)

        def load() -> LoadedModel:
            return_free_memory()        # what the epoch before has left: its engine's parts refer to each other
            folder = locate_checkpoint(self._config.model, "all", self._note_fetch)
            self._detail = ""
            loader = WeightLoader(folder, args, getattr(torch, self._config.model.dtype), kernels)
            return load_model(loader, epoch, rank, note)
        self._model = await self._in_thread(load)
        return self._model

    def _note_fetch(self, line: str) -> None:
        """Show in the status how far the checkpoint is, while it is fetched. Called on the model's thread."""
        logger.info("checkpoint shard_id=%s %s", self.shard_id, line)
        self._detail = line

    async def _fail(self, error: ModelError) -> None:
        """Tell the coordinator why, once, at once: this process ends."""
        self._detail = str(error)
        self._advance(ShardState.FAILED, self._detail)
        if self._member is not None:
            with contextlib.suppress(CoordinatorUnavailableError):
                await self._coordinator.report(self._member, self.status())

    async def _send(self, status: ShardStatus) -> None:
        assert self._member is not None
        if await self._coordinator.report(self._member, status):
            await self._coordinator.report(self._member, status, self._epoch)

    async def _report_steps(self) -> None:
        """The load of the experts, and the work: now and then, when steps have been made since."""
        counters, num_reported = self._counters, 0
        while True:
            await asyncio.sleep(LOAD_REPORT_S)
            num_steps = counters.loads.num_steps
            if num_steps != num_reported:
                with contextlib.suppress(CoordinatorUnavailableError):
                    now_s = time.monotonic()
                    await self._coordinator.report_expert_load(self.shard_id, counters.loads.snapshot(now_s),
                                                               counters.work.snapshot(now_s))
                    num_reported = num_steps

    def status(self) -> ShardStatus:
        run, model = self._run, self._model
        load = run.engine.load() if run else ShardLoad()
        return ShardStatus(
            shard_id=self.shard_id, epoch_number=self._epoch.number if self._epoch else 0, state=self._lifecycle.state,
            num_running=load.num_running, num_waiting=load.num_waiting,
            kv_blocks_total=load.kv_blocks_total, kv_blocks_free=load.kv_blocks_free,
            state_slots_total=load.state_slots_total, state_slots_free=load.state_slots_free,
            num_snapshots=load.num_snapshots, num_cached_tokens=load.num_cached_tokens,
            weights_bytes=model.decoder.weights_bytes if model else 0,
            kv_cache_bytes=run.kv_cache_bytes if run else 0, resident_bytes=resident_memory_bytes(),
            bytes_read=self._progress[0], bytes_to_read=self._progress[1],
            num_steps=run.engine.num_steps if run else 0,
            num_tokens_computed=run.engine.num_tokens_computed if run else 0,
            num_expert_rows=run.engine.num_expert_rows if run else 0,
            num_expert_copies=model.num_expert_copies if model else 0,
            revision=run.engine.revision if run else 0, prepared_revision=run.prepared_revision if run else 0,
            failed_revision=run.revisions.failed_revision if run else 0,
            detail=(run.revisions.detail if run else "") or self._detail)

    def _advance(self, to: ShardState, why: str) -> None:
        self._lifecycle.advance(to, why)
        self._reporter.notify()

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _is_news(status: ShardStatus, sent: ShardStatus) -> bool:
    return (replace(status, resident_bytes=sent.resident_bytes) != sent
            or abs(status.resident_bytes - sent.resident_bytes) > _NOISE_BYTES)
