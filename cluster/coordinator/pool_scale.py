"""Pools that are to have more or fewer shards on a running service: who leaves, and what Ray Serve is asked for.

Serve chooses itself whom it stops when a deployment is to have fewer replicas: those first that do not run yet. So the
shard that is to go leaves the group and ends its process, Serve begins another in its place, and only then is asked for
fewer: it stops the one that has just begun.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.coordinator.client import CoordinatorUnavailableError
from cluster.coordinator.group_size import GroupSize
from cluster.coordinator.leaving import check_others_suffice
from cluster.coordinator.reports import Report
from cluster.coordinator.view import ShardState, View
from cluster.planner.layer.error import PlacementError
from cluster.planner.plan_rules import PlanRules
from serving.link.epoch import Epoch
from serving.router.router_load import RouterLoad

LOOK_S = 5.0            # how often Serve is asked what it has
HURRY_S = 0.5           # while it has something else than it is to have


@dataclass(frozen=True, slots=True)
class ServedPool:
    """What Ray Serve has of a pool."""

    target: int             # replicas that it keeps
    num_running: int
    message: str = ""       # why it has others than it keeps


@dataclass(frozen=True, slots=True)
class Served:
    of_pool: Mapping[str, ServedPool]
    may_scale: bool = True      # the application was deployed so that others than Serve choose numbers of replicas


class ServeReplicas(Protocol):
    """Ray Serve, or what takes its place. Raises CoordinatorUnavailableError when it does not answer."""

    async def read(self) -> Served: ...
    async def keep(self, pool: str, num_replicas: int) -> None: ...


@dataclass(frozen=True, slots=True)
class PoolScale:
    """Tells how far a pool is from the shards that it is to have."""

    pool: str
    wanted: int
    num_members: int            # in the group, and to stay there
    leaving: tuple[str, ...]    # shard ids
    is_done: bool
    detail: str


class PoolSizes:
    """Keeps how many shards the pools are to have, and has Serve follow. Where Serve was told otherwise by somebody
    else, that counts; a new coordinator begins with what Serve keeps, and with what members know that it is to."""

    def __init__(self, size: GroupSize) -> None:
        self.size = size
        self._start = size
        self.served = Served({})
        self._asked: set[str] = set()       # pools that `want` was called for
        self._has_news = asyncio.Event()

    def want(self, pool: str, num: int) -> None:
        """Want so many of a pool. Pools that sleep wake together: the others with as many as the service started
        with."""
        if num and self.size.is_asleep:
            self.size, self._asked = self._start, set(self._start.pools)
        self._asked |= {pool}
        self.size = self.size.with_wanted(pool, num)
        self._has_news.set()

    def sleep(self, loads: Sequence[RouterLoad]) -> None:
        """Want no shard of any pool, until one is wanted again. Raises PlacementError unless all routers say that
        there is no request, and for a Serve that is not to be told."""
        self.check_may_scale()
        if not loads or any(load.num_held for load in loads):
            raise PlacementError("a request has come, or no router reports", fix="wait until there is none")
        for pool in self.size.pools:
            self.want(pool, 0)

    @property
    def untold(self) -> tuple[tuple[str, int], ...]:
        """Return the pools and sizes that were asked for and that Serve does not keep yet."""
        return tuple((pool, limits.wanted) for pool, limits in self.size.of_pool.items() if pool in self._asked
                     and (pool not in self.served.of_pool or self.served.of_pool[pool].target != limits.wanted))

    def adopt(self, sizes: Iterable[tuple[str, int]]) -> None:
        """Go on with what the coordinator before has not told Serve, but for what was asked of this one."""
        for pool, num in sizes:
            if pool in self.size.of_pool and pool not in self._asked:
                self.want(pool, num)

    def check(self, pool: str, num: int) -> None:
        """Raise PlacementError for a pool that is not known, a number beyond its limits, and a Serve that is not to be
        told."""
        if pool not in self.size.of_pool:
            raise PlacementError(f"there is no pool {pool!r}",
                                 fix=f"name one of those that are: {', '.join(self.size.pools)}")
        limits = self.size.of_pool[pool]
        if not limits.least <= num <= limits.most:
            raise PlacementError(f"pool {pool} may have {limits.least} to {limits.most} shards, not {num}",
                                 fix="name a number between them, or start the service with another min_replicas or "
                                     "max_replicas of the pool")
        self.check_may_scale()

    def check_may_scale(self) -> None:
        """Raise PlacementError for a Serve that is not to be told."""
        if not self.served.may_scale:
            raise PlacementError("this application was deployed so that Ray Serve alone sets numbers of replicas",
                                 fix="write external_scaler_enabled: true beside its import_path, and deploy it again")

    def progress(self, pool: str, view: View) -> PoolScale:
        """Return how far a pool is."""
        wanted, served = self.size.of_pool[pool].wanted, self.served.of_pool.get(pool)
        members = [member.shard_id for member in (view.epoch.members if view.epoch else ()) if member.pool == pool]
        leaving = tuple(shard_id for shard_id in members if shard_id in view.leaving)
        num_members = len(members) - len(leaving)
        is_done = num_members == wanted and not leaving and (served is None or served.target == wanted)
        parts = [f"{num_members} of {wanted} shards of pool {pool} are in the group",
                 *([f"{', '.join(leaving)} leaves"] if leaving else []), *([view.why] if view.why else []),
                 *([f"Ray Serve: {served.message}"] if served is not None and served.message else [])]
        return PoolScale(pool, wanted, num_members, leaving, is_done, "; ".join(parts))

    def dismissed(self, view: View, reports: Iterable[Report]) -> tuple[str, ...]:
        """Return the shards whose processes are to end: they were told to leave, have left, and their pool has more
        than it is to have; of pools that sleep all that have left the group."""
        in_group = {member.shard_id for epoch in (view.epoch, view.coming) if epoch is not None
                    for member in epoch.members}
        live = [report for report in reports if report.status.state != ShardState.FAILED]
        ended: list[str] = []
        for pool, limits in self.size.of_pool.items():
            of_pool = [report for report in live if report.member.pool == pool]
            have_left = sorted(report.member.shard_id for report in of_pool if report.member.shard_id not in in_group
                               and (report.status.is_leaving or self.size.is_asleep))
            ended += have_left[:max(0, len(of_pool) - limits.wanted)]
        return tuple(ended)

    async def follow(self, serve: ServeReplicas, on_change: Callable[[], None]) -> None:
        """Keep Serve's replicas as they are wanted, until cancelled. `on_change` is called after each look."""
        while True:
            self._has_news.clear()
            with contextlib.suppress(CoordinatorUnavailableError):
                self._hear(await serve.read())
                await self._tell(serve)
            on_change()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if self._is_settled() else HURRY_S):
                    await self._has_news.wait()

    def _hear(self, served: Served) -> None:
        known = self.served.of_pool
        self.served = Served({**known, **served.of_pool}, served.may_scale)
        for pool, now in served.of_pool.items():
            if known[pool].target != now.target if pool in known else pool not in self._asked:
                self.size = self.size.with_wanted(pool, now.target)
        if not self.size.is_asleep:     # a coordinator may be lost when it has told some pools to sleep, or to wake
            for pool, limits in list(self.size.of_pool.items()):
                if limits.wanted < limits.least:
                    self.want(pool, self._start.of_pool[pool].wanted)

    async def _tell(self, serve: ServeReplicas) -> None:
        for pool, now in list(self.served.of_pool.items()):
            target = next_target(self.size.of_pool[pool].wanted, now)
            if target != now.target:
                await serve.keep(pool, target)
                self.served = replace(self.served, of_pool={**self.served.of_pool, pool: replace(now, target=target)})

    def _is_settled(self) -> bool:
        return all(now.target == self.size.of_pool[pool].wanted for pool, now in self.served.of_pool.items())


def next_target(wanted: int, served: ServedPool) -> int:
    """Return how many replicas Serve is to keep by now: never fewer than run, so that it stops none of those."""
    return wanted if wanted >= served.target else max(wanted, min(served.num_running, served.target))


def choose_leavers(pool: str, num: int, shard_id: str | None, live: Sequence[Report], epoch: Epoch | None,
                   rules: PlanRules) -> tuple[str, ...]:
    """Return who of a pool is to leave so that so many stay: `shard_id`, then those who can best be missed. `live`: all
    that were heard lately. Raises PlacementError when the others cannot hold the model."""
    here = [report for report in live if report.member.pool == pool and not report.status.is_leaving
            and report.status.state != ShardState.FAILED]
    leaving, chosen = {report.member.shard_id for report in live if report.status.is_leaving}, list[str]()
    for _ in range(len(here) - num):
        going = {*leaving, *chosen}
        candidates = [report for report in here if report.member.shard_id not in going]
        if shard_id is not None and not chosen:
            candidates = _the_one(candidates, shard_id)
        candidates.sort(key=lambda report: _loss(report, epoch, going))
        chosen.append(_first_that_can_go(candidates, epoch, going, rules))
    return tuple(chosen)


def _the_one(candidates: Sequence[Report], shard_id: str) -> list[Report]:
    found = [report for report in candidates if report.member.shard_id == shard_id]
    if not found:
        names = ", ".join(sorted(report.member.shard_id for report in candidates))
        raise PlacementError(f"the pool has no shard {shard_id!r}", fix=f"name one of those that are here: {names}")
    return found


def _first_that_can_go(candidates: Sequence[Report], epoch: Epoch | None, going: Collection[str],
                       rules: PlanRules) -> str:
    refused: PlacementError | None = None
    for report in candidates:
        shard_id = report.member.shard_id
        if epoch is None or epoch.rank_of(shard_id) is None:
            return shard_id
        try:
            check_others_suffice(epoch, {*going, shard_id}, rules)
        except PlacementError as error:
            refused = refused or error
        else:
            return shard_id
    assert refused is not None, "there are more candidates than are to go"
    raise refused


def _loss(report: Report, epoch: Epoch | None, going: Collection[str]) -> tuple[int, int, int]:
    """Return the expert copies that would have to move, the requests that would, and the rank: the last goes first."""
    rank = epoch.rank_of(report.member.shard_id) if epoch is not None else None
    if epoch is None or rank is None:
        return (-1, 0, 0)
    gone = {rank, *(index for index, member in enumerate(epoch.members) if member.shard_id in going)}
    num_only_here = sum(set(holders) <= gone for layer in epoch.placement.holders for holders in layer)
    return (num_only_here, report.status.num_running + report.status.num_waiting, -rank)
