"""What can happen to the processes of a group, drawn at random: never so much that fewer than two members are left."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable

from benchmarks.local_group.group import WAIT_S, LocalGroup, LocalGroupError, LocalProcess
from cluster.coordinator.client import CoordinatorUnavailableError

LEAST_MEMBERS = 2
_LOOK_S = 0.1
_REPLACED_AFTER_S = (0.0, 1.0)
_STOPPED_S = (0.1, 4.0)
_EXTRA_NODE = "extra"


class Faults:
    """Each fault is a coroutine that returns when it is over: what was killed has been started again."""

    def __init__(self, group: LocalGroup, draw: random.Random) -> None:
        self.stopped: set[str] = set()          # names of shards that stand still
        self._group = group
        self._draw = draw
        self._is_extra_wanted = False
        self._kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "kill": self.kill, "stop": self.stop, "end": self.end, "drain": self.drain, "join": self.join,
            "leave": self.leave, "coordinator": self.kill_coordinator, "router": self.kill_router}

    def present(self) -> list[LocalProcess]:
        """Return the shards that live and run."""
        return [shard for shard in self._group.alive("shard") if shard.name not in self.stopped]

    def possible(self, kinds: list[str]) -> list[str]:
        """Return those of the kinds that may happen now."""
        num, extra, most = len(self.present()), self._extra(), self._group.config.pools[0].most_replicas
        spare = num > LEAST_MEMBERS
        allowed = {"kill": spare, "stop": spare, "end": spare, "drain": spare,
                   "join": not extra and num < most, "leave": bool(extra) and spare,
                   "coordinator": True, "router": len(self._group.alive("router")) > 1}
        return [kind for kind in kinds if allowed[kind]]

    def start(self, kind: str) -> asyncio.Task[None]:
        """Let it happen from now on."""
        return asyncio.ensure_future(self._kinds[kind]())

    async def kill(self) -> None:
        """A member dies, and is started again."""
        victim = self._draw.choice(self.present())
        victim.kill()
        await self._replace(victim)

    async def stop(self) -> None:
        """A member stands still for a while, perhaps longer than the others wait for it."""
        victim = self._draw.choice(self.present())
        self.stopped.add(victim.name)
        victim.stop()
        await asyncio.sleep(self._draw.uniform(*_STOPPED_S))
        victim.resume()
        self.stopped.discard(victim.name)

    async def end(self) -> None:
        """A member is told to end, as by a rolling restart."""
        victim = self._draw.choice(self.present())
        victim.tell_to_end()
        await victim.until_ended()
        await self._replace(victim)

    async def drain(self) -> None:
        """A member is drained by an order, then told to end. Raises LocalGroupError when it takes too long."""
        victim = self._draw.choice(self.present())
        operation_id, until_s = f"chaos-{self._draw.randrange(1 << 31)}", time.monotonic() + WAIT_S
        while victim.is_alive and not await self._is_drained(victim, operation_id):
            if time.monotonic() > until_s:
                raise LocalGroupError(f"{victim.name} is not drained after {WAIT_S:.0f} s")
            await asyncio.sleep(_LOOK_S)
        if victim.is_alive:                     # something else may have ended it
            victim.tell_to_end()
        await self._replace(victim)

    async def _is_drained(self, victim: LocalProcess, operation_id: str) -> bool:
        try:
            return (await self._group.coordinator.drain(victim.name, operation_id)).is_done
        except CoordinatorUnavailableError:     # it starts again, or does not know the member yet
            return False

    async def join(self) -> None:
        """One node more is there, and is wanted."""
        self._is_extra_wanted = True
        self._group.start_shard(_EXTRA_NODE)
        await self._scale()

    async def leave(self) -> None:
        """The node more is not wanted any more, and goes."""
        self._is_extra_wanted = False
        for shard in self._extra():
            shard_id = await self._shard_id_of(shard)
            await self._scale(shard_id)
            if shard_id is None:        # it has yet to register
                shard.tell_to_end()
            await shard.until_ended()

    async def kill_coordinator(self) -> None:
        """It starts again, and is told what Ray Serve would tell it."""
        for coordinator in self._group.alive("coordinator"):
            coordinator.kill()
            await coordinator.until_ended()
        await asyncio.sleep(self._draw.uniform(*_REPLACED_AFTER_S))
        self._group.start_coordinator()
        await self._scale()

    async def kill_router(self) -> None:
        router = self._draw.choice(self._group.alive("router"))
        router.kill()
        await router.until_ended()
        await asyncio.sleep(self._draw.uniform(*_REPLACED_AFTER_S))
        self._group.start_router(router.node)

    async def num_serving(self) -> int:
        """Return how many shards that run are in the epoch; 0 when the coordinator does not answer."""
        try:
            epoch = (await self._group.status()).view.epoch
        except CoordinatorUnavailableError:
            return 0
        names = {shard.name for shard in self.present()}
        return sum(member.node_name in names for member in epoch.members) if epoch else 0

    async def _replace(self, victim: LocalProcess) -> None:
        await victim.until_ended()
        await asyncio.sleep(self._draw.uniform(*_REPLACED_AFTER_S))
        self._group.start_shard(victim.node)

    async def _scale(self, shard_id: str | None = None) -> None:
        """Have the pool wanted as large as it is to be. Raises LocalGroupError when it takes too long."""
        pool = self._group.config.pools[0]
        num_wanted = pool.most_replicas if self._is_extra_wanted else pool.replicas
        until_s = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(CoordinatorUnavailableError):
                await self._group.coordinator.scale(pool.name, num_wanted, shard_id)
                return
            if time.monotonic() > until_s:
                raise LocalGroupError(f"nobody takes {num_wanted} shards as wanted after {WAIT_S:.0f} s")
            await asyncio.sleep(_LOOK_S)

    async def _shard_id_of(self, process: LocalProcess) -> str | None:
        """Return the id under which a process has registered; None also when there is no coordinator now."""
        with contextlib.suppress(CoordinatorUnavailableError):
            for member, _ in (await self._group.status()).shards:
                if member.node_name == process.name:
                    return member.shard_id
        return None

    def _extra(self) -> list[LocalProcess]:
        return [shard for shard in self.present() if shard.node == _EXTRA_NODE]
