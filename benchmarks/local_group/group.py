"""Starts, kills, stops, continues and ends the processes of a local group, and says how they are."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.local_group.footprint import Footprint, footprint_of
from benchmarks.local_group.remote import RemoteObject, coordinator_at
from benchmarks.local_group.roles import Role, coordinator_socket, run_role
from cluster.coordinator.client import CoordinatorApi, CoordinatorUnavailableError
from cluster.coordinator.view import ClusterStatus, GroupPhase
from serving.config import ServeConfig

_PRELOADED = ["cluster.shard.shard", "cluster.router_replica", "cluster.coordinator.coordinator",
              "cluster.planner.group_plan"]
_LOOK_S = 0.02
WAIT_S = 240.0          # for what comes in its own time, on a busy machine too: only a failure takes so long
LOG_TAIL_LINES = 40


class LocalGroupError(Exception):
    """The group is not as it should be; the message has the ends of the logs."""


@dataclass
class LocalProcess:
    """One process of the group. `name` is its own; `node` is also that of what replaces it."""

    role: Role
    process: BaseProcess
    was_killed: bool = False

    @property
    def name(self) -> str:
        return self.role.name

    @property
    def node(self) -> str:
        return self.role.node_id

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.was_killed = True
        os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def hold_python_lock(self) -> None:
        """Have it hold Python's lock for LOCK_S from now on."""
        os.kill(self.pid, signal.SIGUSR1)

    def tell_to_end(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    async def until_ended(self, timeout_s: float = WAIT_S) -> None:
        """Raises LocalGroupError when it takes longer."""
        until_s = time.monotonic() + timeout_s
        while self.is_alive:
            if time.monotonic() > until_s:
                raise LocalGroupError(f"{self.name} (process {self.pid}) goes on {timeout_s:.0f} s after its end")
            await asyncio.sleep(_LOOK_S)

    def log_tail(self) -> str:
        lines = self.role.log_path.read_text(errors="replace").splitlines() if self.role.log_path.exists() else []
        return "\n".join([f"-- {self.name}", *lines[-LOG_TAIL_LINES:]])


@dataclass
class LocalGroup:
    """Use it as a context: `async with LocalGroup(config, folder) as group`. All processes end with it."""

    config: ServeConfig
    folder: Path
    started: list[LocalProcess] = field(default_factory=list)       # all that there ever were

    def __post_init__(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")       # before torch is imported: its threads wait by spinning
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self.coordinator: CoordinatorApi = coordinator_at(coordinator_socket(self.folder))

    async def __aenter__(self) -> LocalGroup:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    # Processes.

    def start_coordinator(self) -> LocalProcess:
        return self._start("coordinator", "coordinator")

    def start_shard(self, node: str, pool: str | None = None) -> LocalProcess:
        """Start one on that node, new or instead of one that is gone."""
        return self._start("shard", node, pool or self.config.pools[0].name)

    def start_router(self, node: str) -> LocalProcess:
        return self._start("router", node)

    def start_all(self, nodes: Iterable[str], num_routers: int = 1) -> None:
        self.start_coordinator()
        for node in nodes:
            self.start_shard(node)
        for index in range(num_routers):
            self.start_router(f"router{index}")

    def alive(self, kind: str) -> list[LocalProcess]:
        """Return those that live and were not killed: on a busy machine it takes a while until one has ended."""
        return [process for process in self.started
                if process.role.kind == kind and process.is_alive and not process.was_killed]

    def named(self, name: str) -> LocalProcess:
        return next(process for process in self.started if process.name == name)

    async def end(self) -> None:
        """Tell all to end, kill what does not."""
        for process in self.started:
            if process.is_alive:
                process.resume()
                process.tell_to_end()
        for process in self.started:
            try:
                await process.until_ended(10.0)
            except LocalGroupError:
                process.kill()
                await process.until_ended()

    def leaked(self) -> list[str]:
        """Return the processes that are still there; call it after end()."""
        return [process.name for process in self.started if process.is_alive]

    def _start(self, kind: str, node: str, pool: str = "") -> LocalProcess:
        number = sum(process.node == node for process in self.started)
        role = Role(kind, f"{node}.{number}", node, pool, self.config, self.folder)
        process = self._context.Process(target=run_role, args=(role,), name=role.name, daemon=True)
        process.start()
        self.started.append(LocalProcess(role, process))
        return self.started[-1]

    # How it is.

    async def status(self) -> ClusterStatus:
        return await self.coordinator.status()

    async def until(self, holds: Callable[[ClusterStatus], bool], what: str, timeout_s: float = WAIT_S
                    ) -> ClusterStatus:
        """Return the first status for which it holds. Raises LocalGroupError after timeout_s."""
        until_s, status = time.monotonic() + timeout_s, None
        while time.monotonic() < until_s:
            try:
                status = await self.status()
            except CoordinatorUnavailableError:
                status = None       # it starts again
            if status is not None and holds(status):
                return status
            await asyncio.sleep(_LOOK_S)
        raise LocalGroupError(f"not within {timeout_s:.0f} s: {what}\n{_told(status)}\n{self.log_tails()}")

    async def until_serving(self, processes: Iterable[LocalProcess] | None = None, timeout_s: float = WAIT_S
                            ) -> ClusterStatus:
        """Return when an epoch of exactly these shards runs, default all that live, and every live router serves it."""
        names = {process.name for process in (self.alive("shard") if processes is None else processes)}
        return await self.until(lambda status: self._serves(status, names), f"{sorted(names)} serve", timeout_s)

    def _serves(self, status: ClusterStatus, names: set[str]) -> bool:
        epoch, routers = status.view.epoch, {router.name for router in self.alive("router")}
        serving = {router.node_name for router in status.routers
                   if router.is_ready and epoch is not None and router.epoch_number == epoch.number}
        return (status.view.phase is GroupPhase.READY and epoch is not None
                and {member.node_name for member in epoch.members} == names and routers <= serving)

    async def router_addresses(self) -> dict[str, str]:
        """Return the gRPC door of every live router, by its name."""
        live = {router.name for router in self.alive("router")}
        return {router.node_name: router.grpc_address for router in (await self.status()).routers
                if router.node_name in live and router.grpc_address}

    async def shards_of_requests(self) -> dict[str, str]:
        """Return the name of the shard process that computes each request, by the client's id of the request."""
        names = {member.shard_id: member.node_name for member, _ in (await self.status()).shards}
        found: dict[str, str] = {}
        for router in self.alive("router"):
            look: Any = RemoteObject(router.role.socket_path)
            found |= {request: names.get(shard_id, shard_id)
                      for request, shard_id in (await look.shards_of_requests()).items()}
        return found

    async def sequences_moved(self) -> dict[str, int]:
        """Return how many of all live routers' sequences went on elsewhere, by way."""
        found: Counter[str] = Counter()
        for router in self.alive("router"):
            look: Any = RemoteObject(router.role.socket_path)
            found.update(await look.sequences_moved())
        return dict(found)

    def footprints(self) -> dict[str, Footprint]:
        """Return what every live process holds, by its name."""
        return {process.name: footprint_of(process.pid) for process in self.started if process.is_alive}

    def log_tails(self) -> str:
        last = {process.node: process for process in self.started}
        return "\n".join(process.log_tail() for process in last.values())


def _told(status: ClusterStatus | None) -> str:
    if status is None:
        return "the coordinator did not answer"
    shards = "\n".join(f"   {member.node_name} {state.state} epoch {state.epoch_number} {state.detail}"
                       for member, state in status.shards)
    routers = "\n".join(f"   {router.node_name} epoch {router.epoch_number} ready {router.is_ready}"
                        for router in status.routers)
    return f"{status.view.phase} {status.view.why}\n{shards}\n{routers}"
