"""Pools with more or fewer shards: who leaves, what Serve is asked for, and when a process ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.coordinator.client import CoordinatorUnavailableError
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.group_size import GroupSize, PoolSize
from cluster.coordinator.membership import GroupRules
from cluster.coordinator.pool_scale import PoolSizes, Served, ServedPool, choose_leavers, next_target
from cluster.coordinator.reports import Report
from cluster.coordinator.view import GroupPhase, ShardState, View
from cluster.planner.layer.error import PlacementError
from model.placement import Placement
from serving.link.epoch import Member
from tests.cluster.coordinator.group_reports import member, rules, status_of
from tests.cluster.coordinator.test_leaving import A, B, C, bring_to_ready, take
from tests.cluster.coordinator.test_membership import first_epoch
from tests.placements import contiguous_placement

D = member("d", budget=1_000_000)
SIZE = GroupSize({"gpu": PoolSize(0, 0, 0), "cpu": PoolSize(1, 3, 4)}, settle_s=30.0)
ONLY_IN_C = Placement(3, (((0, 1), (0, 1), (0, 1), (0, 1), (2,), (2,)),) * 2)


def elastic() -> GroupRules:
    return replace(rules(), size=SIZE)


def report_of(one: Member, num_running: int = 0, is_leaving: bool = False,
              state: ShardState = ShardState.READY) -> Report:
    return Report(one, replace(status_of(one, state, 1), num_running=num_running, is_leaving=is_leaving), 0.0)


@pytest.mark.parametrize(("wanted", "target", "num_running", "told"), [
    (4, 3, 3, 4),       # more: at once
    (3, 3, 2, 3),
    (2, 3, 3, 3),       # fewer: Serve would choose one that runs
    (2, 3, 2, 2),       # and now it stops the one that it has begun in place of the one that is gone
    (2, 3, 1, 2),
    (1, 3, 2, 2),
    (2, 3, 4, 3),       # it stops one already
])
def test_serve_is_never_asked_to_keep_fewer_replicas_than_run(wanted: int, target: int, num_running: int,
                                                              told: int) -> None:
    assert next_target(wanted, ServedPool(target, num_running)) == told


def chosen(num: int, *reports: Report, placement: Placement = ONLY_IN_C,
           shard_id: str | None = None) -> tuple[str, ...]:
    members = tuple(report.member for report in reports if report.member != D)
    epoch = replace(first_epoch(), members=members, placement=placement)
    return choose_leavers("cpu", num, shard_id, reports, epoch, elastic().plan)


def test_those_leave_who_can_best_be_missed() -> None:
    a, b, c = (report_of(one) for one in (A, B, C))
    assert chosen(2, a, b, c) == ("cpu-b",)                         # c holds what nobody else has; of two the last
    assert chosen(2, a, report_of(B, num_running=1), c) == ("cpu-a",)
    assert chosen(1, a, b, c) == ("cpu-b", "cpu-c")                 # now a holds as much alone, and comes first
    assert chosen(2, a, b, c, shard_id="cpu-c") == ("cpu-c",)
    assert chosen(1, a, b, c, shard_id="cpu-c") == ("cpu-c", "cpu-b")
    assert chosen(3, a, b, c, report_of(D, state=ShardState.WAITING)) == ("cpu-d",)     # is in no group
    assert chosen(2, a, b, report_of(C, is_leaving=True)) == () == chosen(3, a, b, c, shard_id="cpu-x")


def test_nobody_leaves_whom_the_others_cannot_do_without() -> None:
    tight = [replace(member(name), facts=replace(A.facts, memory_budget_bytes=730)) for name in "abc"]
    single = contiguous_placement(2, 6, (2, 2, 2))
    assert chosen(2, *map(report_of, tight), placement=single) == ("cpu-c",)
    with pytest.raises(PlacementError, match="600 bytes are missing"):
        chosen(1, *map(report_of, tight), placement=single)
    with pytest.raises(PlacementError, match=r"no shard 'cpu-x'.*cpu-a, cpu-b, cpu-c"):
        chosen(2, *map(report_of, (A, B, C)), shard_id="cpu-x")


def test_limits_and_names_are_checked() -> None:
    sizes = PoolSizes(SIZE)
    for num in (0, 5):
        with pytest.raises(PlacementError, match=f"may have 1 to 4 shards, not {num}"):
            sizes.check("cpu", num)
    with pytest.raises(PlacementError, match="no pool 'tpu'.*gpu, cpu"):
        sizes.check("tpu", 1)
    sizes.served = Served({}, may_scale=False)
    with pytest.raises(PlacementError, match="external_scaler_enabled: true"):
        sizes.check("cpu", 4)


def test_processes_end_that_have_left_and_are_too_many() -> None:
    epoch = first_epoch()
    of_two = replace(epoch, members=(A, B), placement=Placement(2, (((0,),) * 6,) * 2), shares=epoch.shares[:2])
    sizes, view = PoolSizes(SIZE), View(GroupPhase.READY, of_two)
    here = [report_of(A), report_of(B, is_leaving=True), report_of(C, is_leaving=True), report_of(D)]
    assert sizes.dismissed(view, here) == ("cpu-c",)
    assert sizes.dismissed(view, here[:3]) == ()            # drained, and the pool is to have as many as it has
    sizes.want("cpu", 2)
    assert sizes.dismissed(view, here[:3]) == ("cpu-c",)    # B is yet in the group
    assert sizes.dismissed(view, here[:2]) == ()


class Serve:
    """Keeps what it is told; a replica runs when somebody says so."""

    def __init__(self, target: int) -> None:
        self.pool = ServedPool(target, target)
        self.is_away = False
        self.looked = asyncio.Event()

    async def read(self) -> Served:
        self.looked.set()
        if self.is_away:
            raise CoordinatorUnavailableError("the controller restarts")
        return Served({"cpu": self.pool})

    async def keep(self, pool: str, num_replicas: int) -> None:
        self.pool = replace(self.pool, target=num_replicas)


async def looked(serve: Serve, sizes: PoolSizes) -> None:
    """Let it look twice: what it does after the first look is done then."""
    for _ in range(2):
        serve.looked.clear()
        sizes.want("gpu", 0)
        await serve.looked.wait()
    await asyncio.sleep(0)


async def test_serve_follows_and_is_followed_where_others_told_it() -> None:
    serve, sizes = Serve(target=4), PoolSizes(SIZE)
    following = asyncio.create_task(sizes.follow(serve, lambda: None))
    await looked(serve, sizes)
    assert sizes.size.of_pool["cpu"].wanted == 4        # as a coordinator before this one had told it
    sizes.want("cpu", 2)
    await looked(serve, sizes)
    assert serve.pool.target == 4                       # all four run
    serve.pool = ServedPool(4, 3)
    await looked(serve, sizes)
    assert serve.pool.target == 3 and sizes.size.of_pool["cpu"].wanted == 2
    serve.is_away = True
    await looked(serve, sizes)
    serve.is_away, serve.pool = False, ServedPool(3, 2)
    await looked(serve, sizes)
    assert serve.pool.target == 2
    serve.pool = ServedPool(3, 2)                       # somebody deploys the application with another number
    await looked(serve, sizes)
    assert sizes.size.of_pool["cpu"].wanted == 3
    following.cancel()


async def test_a_pool_shrinks_by_the_one_that_is_named_and_grows_again() -> None:
    coordinator = Coordinator(elastic(), lambda: 100.0)
    await bring_to_ready(coordinator)
    asked = await coordinator.scale("cpu", 2, "cpu-b")
    assert not asked.is_done and asked.leaving == ("cpu-b",) and asked.num_members == 2
    assert "cpu-b leaves" in asked.detail
    assert (await coordinator.scale("cpu", 2, "cpu-b")).leaving == ("cpu-b",)
    await take(coordinator, A, B, C)
    view = await coordinator.watch("", 0.0)
    assert view.epoch is not None and view.epoch.members == (A, C) and view.dismissed == ("cpu-b",)
    await coordinator.forget_shard("cpu-b")
    for state in (ShardState.LOADED, ShardState.READY):
        for one in (A, C):
            await coordinator.report(one, status_of(one, state, 2))
    assert (await coordinator.scale("cpu", 2)).is_done
    await coordinator.report(D, status_of(D))           # Serve's replacement is not taken in
    assert (await coordinator.watch("", 0.0)).dismissed == () and not (await coordinator.scale("cpu", 3)).is_done
    view = await coordinator.watch("", 0.0)
    while view.coming is None:
        view = await coordinator.watch(view.key, 60.0)
    assert view.coming.members == (A, C, D)


async def test_a_pool_that_shrinks_does_so_under_the_next_coordinator() -> None:
    first = Coordinator(elastic(), lambda: 100.0)
    epoch = await bring_to_ready(first)
    await first.scale("cpu", 2, "cpu-b")
    remembered = (await first.watch("", 0.0)).remembered
    assert remembered.sizes == (("cpu", 2),)
    second = Coordinator(elastic(), lambda: 100.0)
    for one in (A, B, C):
        if await second.report(one, status_of(one, ShardState.READY, 1)):
            await second.report(one, status_of(one, ShardState.READY, 1), epoch, remembered)
    await take(second, A, B, C)
    view = await second.watch("", 0.0)
    assert view.epoch is not None and view.epoch.members == (A, C) and view.dismissed == ("cpu-b",)


def test_what_was_asked_since_counts_more_than_what_was_remembered() -> None:
    sizes = PoolSizes(SIZE)
    sizes.want("cpu", 4)
    sizes.adopt((("cpu", 2), ("tpu", 1)))
    assert sizes.untold == (("cpu", 4),)
    sizes.served = Served({"cpu": ServedPool(4, 3)})
    assert sizes.untold == ()           # Serve keeps it


def test_a_coordinator_that_was_lost_while_some_pools_were_told_leaves_none_without_a_shard() -> None:
    size = GroupSize({"cpu": PoolSize(1, 2, 3), "gpu": PoolSize(1, 3, 4)}, 30.0)
    sizes = PoolSizes(size)
    sizes._hear(Served({"cpu": ServedPool(0, 0), "gpu": ServedPool(1, 1)}))
    assert [limits.wanted for limits in sizes.size.of_pool.values()] == [2, 1]
    sizes = PoolSizes(size)
    sizes._hear(Served({"cpu": ServedPool(0, 0), "gpu": ServedPool(0, 0)}))
    assert sizes.size.is_asleep
    sizes.want("gpu", 1)                # the others wake with it, as many as a service begins with
    assert [limits.wanted for limits in sizes.size.of_pool.values()] == [2, 1]


async def test_what_cannot_be_changes_nothing() -> None:
    coordinator = Coordinator(elastic(), lambda: 100.0)
    await bring_to_ready(coordinator)
    with pytest.raises(PlacementError, match="no shard 'cpu-x'"):
        await coordinator.scale("cpu", 2, "cpu-x")
    assert (await coordinator.scale("cpu", 3)).is_done and not (await coordinator.watch("", 0.0)).leaving
