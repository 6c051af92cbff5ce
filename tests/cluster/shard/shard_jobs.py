"""Real shards, each with its event loop on a thread of its worker process; jobs tell them what the coordinator says."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from cluster.coordinator.view import (
    NOTHING,
    GroupPhase,
    PlacementStatus,
    Remembered,
    RouterReport,
    ShardState,
    View,
)
from cluster.device.node import NodeIdentity
from cluster.shard.parts import ShardParts
from cluster.shard.shard import Shard
from model.runner import Runner
from serving.config import GroupConfig, ModelConfig, PoolConfig, SchedulerConfig, ServeConfig
from serving.engine.engine import Engine
from serving.engine.expert_load import ExpertLoad
from serving.engine.request import Submission
from serving.link.epoch import Epoch, Member, ShardStatus, WorkRatio
from tests.deadlines import BEYOND_PATIENCE_S, PATIENCE_S
from tests.process_pool import Worker

T = TypeVar("T")

SILENCE_S = 5.0     # of a member that hangs; the others answer within it on a busy machine too


class DirectedCoordinator:
    """Shows the views that the test gives it, and keeps what the shard reports."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.member: Member | None = None
        self.status: ShardStatus | None = None
        self.changed = asyncio.Event()

    def show(self, view: View) -> None:
        self._view = view
        self._announce()

    async def watch(self, seen_key: str, timeout_s: float) -> View:
        while self._view.key == seen_key:
            await self.changed.wait()
        return self._view

    async def report(self, member: Member, status: ShardStatus, epoch: Epoch | None = None,
                     remembered: Remembered = NOTHING) -> bool:
        self.member, self.status = member, status
        self._announce()
        return False

    async def report_router(self, report: RouterReport) -> PlacementStatus | None:
        return None

    async def forget_router(self, router_id: str) -> None: ...
    async def forget_shard(self, shard_id: str) -> None: ...
    async def report_expert_load(self, shard_id: str, load: ExpertLoad, ratio: WorkRatio | None) -> None: ...

    def _announce(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class LiveShard:
    """One shard that runs until `stop`."""

    def __init__(self, folder: Path, view: View, memory_budget: int) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.call(self._start(folder, view, memory_budget))

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    async def _start(self, folder: Path, view: View, memory_budget: int) -> None:
        pool = PoolConfig(memory_budget=memory_budget, num_cpus=1)
        config = ServeConfig(model=ModelConfig(path=str(folder)), pools=(pool,),
                             group=GroupConfig(collective_timeout_s=BEYOND_PATIENCE_S,
                                               silence_timeout_s=SILENCE_S),
                             scheduler=SchedulerConfig(max_batch_tokens=32, max_running_requests=8))
        self._coordinator = DirectedCoordinator(view)
        shard = Shard(config, pool, NodeIdentity("n", "node", "127.0.0.1"), self._coordinator)
        self._run_task = asyncio.create_task(shard.run())

    async def show(self, view: View) -> None:
        self._coordinator.show(view)

    async def until(self, state: ShardState, epoch_number: int) -> tuple[Member, ShardStatus]:
        """Wait until the shard reports that state in that epoch."""
        while True:
            member, status = self._coordinator.member, self._coordinator.status
            if member and status and (status.state, status.epoch_number) == (state, epoch_number):
                return member, status
            changed = asyncio.create_task(self._coordinator.changed.wait())
            await asyncio.wait((changed, self._run_task), return_when=asyncio.FIRST_COMPLETED)
            if self._run_task.done():
                await self._run_task

    async def occupy_model_thread(self) -> None:
        """Let it do something that takes until `free_model_thread`."""
        self._is_free = threading.Event()
        parts = next(thing for thing in gc.get_objects() if isinstance(thing, ShardParts))
        parts.thread.submit(self._is_free.wait)

    async def free_model_thread(self) -> None:
        self._is_free.set()

    async def submit(self, submission: Submission) -> None:
        engine = next(thing for thing in gc.get_objects() if isinstance(thing, Engine))
        engine.submit("router", submission)

    async def until_tokens(self, request_id: str, num_tokens: int) -> list[int]:
        """Return what a sequence has produced when it is so much."""
        engine = next(thing for thing in gc.get_objects() if isinstance(thing, Engine))
        request = engine.scheduler._requests[request_id]
        while len(request.output_token_ids) < num_tokens:       # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return list(request.output_token_ids)

    async def tell_to_end(self) -> None:
        self._run_task.cancel()

    async def until_leaving(self) -> bool:
        """Wait until it has said that it is to go -> whether it still runs."""
        while self._coordinator.status is None or not self._coordinator.status.is_leaving:
            await self._coordinator.changed.wait()
        return not self._run_task.done()

    async def until_ended(self) -> None:
        await asyncio.wait((self._run_task,))

    async def stop(self) -> None:
        self._coordinator.show(View(GroupPhase.WAITING, None, "the test is over"))     # nobody is to go on without it
        self._run_task.cancel()
        await asyncio.wait((self._run_task,))

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


def start(worker: Worker, folder: Path, view: View, memory_budget: int) -> Member:
    """Start a shard -> the member as which it registers."""
    live = worker.kept["shard"] = LiveShard(folder, view, memory_budget)
    return live.call(live.until(ShardState.WAITING, 0))[0]


def do(worker: Worker, method: str, *arguments: object) -> object:
    """Call a method of this worker's LiveShard."""
    live: LiveShard = worker.kept["shard"]
    return live.call(getattr(live, method)(*arguments))


def num_runners(worker: Worker) -> int:
    """Count the engines' runners that are still in memory, each with its KV cache."""
    return sum(isinstance(thing, Runner) for thing in gc.get_objects())


def stop(worker: Worker) -> None:
    live: LiveShard | None = worker.kept.pop("shard", None)
    if live is not None:
        live.call(live.stop())
        live.end()
