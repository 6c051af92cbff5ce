"""Members of a real group, each with its event loop on a thread of its worker process; jobs tell them what to do."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from cluster.coordinator.client import ViewFollower
from cluster.coordinator.view import NOTHING, ClusterStatus, GroupPhase, Remembered, RouterReport, View
from cluster.planner.cache_plan import CacheSizes
from cluster.shard.block_exchange import BlockExchange
from cluster.shard.epoch_run import EpochRun
from cluster.shard.executor import StepCounters
from cluster.shard.heartbeats import Heartbeats
from cluster.shard.held_engine import HeldEngine
from cluster.shard.loaded_model import load_model, new_pace, new_runner
from cluster.shard.parts import ShardParts
from cluster.shard.work_meter import WorkMeter
from model.args import read_model_args
from model.errors import GroupError
from model.kernels.select import select_kernels
from model.transport.address import EndpointAddress
from model.transport.endpoint import Endpoint
from model.weights import WeightLoader
from serving.config import ModelConfig, PoolConfig, SchedulerConfig, ServeConfig
from serving.engine.expert_load import ExpertLoad, ExpertLoadCounter
from serving.engine.request import Submission, TokenEvent
from serving.engine.sequence_traces import SequenceTraces
from serving.link.epoch import Epoch, Member, ShardStatus, WorkRatio
from serving.link.security import PLAIN
from serving.link.server import ShardLinkServer, start_link_server
from tests.cluster.profiles import PROFILE
from tests.deadlines import PATIENCE_S
from tests.process_pool import Worker

NUM_BLOCKS = 128
T = TypeVar("T")


@dataclass(frozen=True)
class Standing:
    """Holds what a member would report."""

    revision: int
    prepared_revision: int
    failed_revision: int
    detail: str
    token_budget: int
    num_expert_copies: int
    num_steps: int


class ScriptedCoordinator:
    """Shows the views that the test gives it."""

    def __init__(self, epoch: Epoch) -> None:
        self._view = View(GroupPhase.READY, epoch)
        self._changed = asyncio.Event()

    def show(self, view: View) -> None:
        self._view = view
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self, seen_key: str, timeout_s: float) -> View:
        while self._view.key == seen_key:
            await self._changed.wait()
        return self._view

    async def report(self, member: Member, status: ShardStatus, epoch: Epoch | None = None,
                     remembered: Remembered = NOTHING) -> bool:
        return False

    async def report_router(self, report: RouterReport) -> None: ...
    async def forget_router(self, router_id: str) -> None: ...
    async def report_expert_load(self, shard_id: str, load: ExpertLoad, ratio: WorkRatio | None) -> None: ...

    async def status(self) -> ClusterStatus:
        return ClusterStatus(self._view, (), ())


class RecordingLink(ShardLinkServer):
    """Rings come through it as always; what the engine delivers is kept, for there is no router."""

    def __init__(self) -> None:
        super().__init__("no router asks for it", time.monotonic)
        self.events: list[TokenEvent] = []

    def deliver(self, router_id: str, step_index: int, events: list[TokenEvent]) -> None:
        self.events += events


class LiveMember:
    """`open`, `join`, then anything, then `leave`. Its methods are called from the worker's main thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._model_thread = ThreadPoolExecutor(1, "model")

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    async def open(self) -> tuple[int, EndpointAddress]:
        self.link, self.endpoint = RecordingLink(), Endpoint("127.0.0.1")
        self._server, port = await start_link_server(self.link, "127.0.0.1:0", own=self.endpoint.address)
        return port, self.endpoint.address

    async def join(self, folder: Path, epoch: Epoch, rank: int) -> None:
        args, kernels = read_model_args(folder), select_kernels("cpu", 1)
        config = ServeConfig(model=ModelConfig(path=str(folder)), pools=(PoolConfig(),),
                             scheduler=SchedulerConfig(max_batch_tokens=32, max_running_requests=8))
        now_s = time.monotonic()
        self.counters = StepCounters(ExpertLoadCounter(args.num_moe_layers, args.num_experts, 1e9, now_s),
                                     WorkMeter(PROFILE, args, 1e9, now_s))
        self.coordinator = ScriptedCoordinator(epoch)
        views = ViewFollower(self.coordinator)
        self._over = asyncio.Event()
        self.heartbeats = Heartbeats(self.endpoint.address, PATIENCE_S)
        parts = ShardParts(config, config.pools[0], self.link, PLAIN, self.endpoint, self.heartbeats,
                           BlockExchange(self.endpoint.address), self._model_thread, views, self.counters,
                           SequenceTraces(None, time.monotonic))
        model = await parts.in_thread(lambda: load_model(
            WeightLoader(folder, args, torch.bfloat16, kernels), epoch, rank, lambda done, total: None))
        sizes = CacheSizes(NUM_BLOCKS if epoch.takes_requests(rank) else 0, 0)
        self.changed = asyncio.Event()
        pace = new_pace(epoch.members[rank], kernels)
        runner = await parts.in_thread(lambda: new_runner(model, sizes, config.scheduler.block_size, pace))
        held = HeldEngine(model, config, sizes, pace, 0, runner)
        self.run = await EpochRun.join(parts, epoch, rank, model, held, self.changed.set)
        self.engine = held.enter(epoch.number, self.run.executor, self.run.ringer.ring_peers, self.link.deliver)
        self.link.serve(self.engine, args.vocab_size)
        self._follow_task = asyncio.create_task(views.run())
        self._run_task = asyncio.create_task(self.run.until(self.engine, self._over.wait()))

    async def show(self, view: View) -> None:
        self.coordinator.show(view)

    async def submit(self, submissions: tuple[Submission, ...]) -> None:
        for submission in submissions:
            self.engine.submit("router", submission)

    async def until_steps(self, number: int) -> None:
        while self.engine.num_steps < number:       # noqa: ASYNC110
            await self._look()

    async def until_standing(self, revision: int, prepared_revision: int, failed_revision: int) -> Standing:
        while (standing := await self.standing()) and (
                standing.revision, standing.prepared_revision, standing.failed_revision) != (
                revision, prepared_revision, failed_revision):
            await self._look()
        return standing

    async def _look(self) -> None:
        if self._run_task.done():
            await self._run_task
        await asyncio.sleep(0.001)

    async def standing(self) -> Standing:
        run, revisions = self.run, self.run.revisions
        return Standing(self.engine.revision, run.prepared_revision, revisions.failed_revision, revisions.detail,
                        self.engine.scheduler.token_budget, revisions.model.num_expert_copies, self.engine.num_steps)

    async def ended(self, num_requests: int) -> list[TokenEvent]:
        """All events, once so many requests have ended."""
        while sum(event.finish_reason is not None for event in self.link.events) < num_requests:
            await self._look()
        return self.link.events

    async def work_ratio(self) -> WorkRatio | None:
        return self.counters.work.snapshot(time.monotonic())

    async def leave(self) -> ExpertLoad:
        self._over.set()
        try:
            with suppress(GroupError):      # a member that left sooner has broken the group
                await self._run_task
        finally:
            await self.run.close()
            self._follow_task.cancel()
            await self._server.stop(None)
        return self.counters.loads.snapshot(time.monotonic())

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._model_thread.shutdown()
        self.endpoint.close()
        self.heartbeats.close()


def open_link(worker: Worker) -> tuple[int, EndpointAddress]:
    """-> the port that peers ring at, and where they find this member's endpoint."""
    worker.kept["live"] = LiveMember()
    opened: tuple[int, EndpointAddress] = worker.kept["live"].call(worker.kept["live"].open())
    return opened


def leave(worker: Worker) -> ExpertLoad:
    """-> what this member has counted."""
    live: LiveMember = worker.kept.pop("live")
    try:
        return live.call(live.leave())
    finally:
        live.end()


def abandon(worker: Worker) -> None:
    """After a test that failed."""
    if "live" in worker.kept:
        leave(worker)


def do(worker: Worker, method: str, *arguments: object) -> object:
    """Call a method of this worker's LiveMember."""
    live: LiveMember = worker.kept["live"]
    return live.call(getattr(live, method)(*arguments))
