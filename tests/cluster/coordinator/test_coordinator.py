"""The coordinator as its members see it, restarts included."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.placement_change import find
from cluster.coordinator.view import NOTHING, GroupPhase, RouterReport, ShardState, View
from cluster.planner.costs.rates_split import split_by_rates
from cluster.planner.layer.error import PlacementError
from cluster.planner.layer.problem import split_matrix
from model.placement import Placement
from serving.config import PlacementConfig
from serving.engine.expert_load import ExpertLoad
from serving.errors import NotReadyError
from serving.link.epoch import Epoch, Link, Member, WorkRatio
from tests.cluster.coordinator.any_order import AnyOrder, AnyOrderOfSleep
from tests.cluster.coordinator.group_reports import member, rules, status_of
from tests.deadlines import PATIENCE_S

A, B, C = (member(name, budget=1_000_000) for name in "abc")


AnyOrder.TestCase.settings = settings(max_examples=40, stateful_step_count=40)
TestAnyOrder = AnyOrder.TestCase
AnyOrderOfSleep.TestCase.settings = AnyOrder.TestCase.settings
TestAnyOrderOfSleep = AnyOrderOfSleep.TestCase


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def coordinator(clock: Clock) -> Coordinator:
    return Coordinator(rules(), clock)


async def planned(coordinator: Coordinator) -> Epoch:
    """The epoch, when its placement has been planned."""
    view = await coordinator.watch("", 0.0)
    while view.epoch is None:
        view = await coordinator.watch(view.key, 60.0)
    return view.epoch


async def bring_to_ready(coordinator: Coordinator) -> Epoch:
    for one in (A, B, C):
        await coordinator.report(one, status_of(one))
    await planned(coordinator)
    for state in (ShardState.LOADED, ShardState.READY):
        for one in (A, B, C):
            await coordinator.report(one, status_of(one, state, epoch_number=1))
    view = await coordinator.watch("", 0.0)
    assert view.phase is GroupPhase.READY and view.epoch is not None
    return view.epoch


async def test_everybody_who_watches_hears_of_a_change_at_once(coordinator: Coordinator) -> None:
    seen = (await coordinator.watch("", 0.0)).key
    watchers = [asyncio.create_task(coordinator.watch(seen, 60.0)) for _ in range(3)]
    await asyncio.sleep(0)
    await coordinator.report(A, status_of(A))
    views = await asyncio.gather(*watchers)
    assert all("1 of 3" in view.why for view in views)


async def test_a_watch_without_news_ends_in_time(coordinator: Coordinator) -> None:
    view = await coordinator.watch("", 0.0)
    assert await coordinator.watch(view.key, 0.001) == view


async def test_healthy_only_when_group_and_routers_serve_the_same_epoch(coordinator: Coordinator) -> None:
    await bring_to_ready(coordinator)
    assert not (await coordinator.status()).is_ready
    await coordinator.report_router(RouterReport("r", "node-a", "a:8", "a:9", epoch_number=0, is_ready=False))
    assert not (await coordinator.status()).is_ready
    await coordinator.report_router(RouterReport("r", "node-a", "a:8", "a:9", epoch_number=1, is_ready=True))
    assert (await coordinator.status()).is_ready


async def test_a_plan_that_somebody_cancelled_is_made_anew(coordinator: Coordinator) -> None:
    for one in (A, B, C):
        await coordinator.report(one, status_of(one))
    planning = [task for task in asyncio.all_tasks() if "Coordinator._plan" in repr(task)]
    assert len(planning) == 1
    planning[0].cancel()
    await asyncio.wait(planning)
    await coordinator.report(A, status_of(A))       # members report again and again
    assert (await planned(coordinator)).number == 1


async def test_why_an_epoch_ended_is_told_until_there_is_another(coordinator: Coordinator) -> None:
    await bring_to_ready(coordinator)
    await coordinator.report(A, status_of(A, ShardState.WAITING, epoch_number=1, detail="a cable"))
    for _ in range(2):
        why = (await coordinator.status()).view.why
        assert "epoch 1 ended: shard cpu-a on node node-a left it: a cable; waiting until all have left" in why
    for one in (B, C):
        await coordinator.report(one, status_of(one, ShardState.WAITING, epoch_number=1))
    assert (await planned(coordinator)).number == 2
    assert "ended" not in (await coordinator.status()).view.why


async def test_a_restart_goes_on_with_the_running_epoch(coordinator: Coordinator, clock: Clock) -> None:
    epoch = await bring_to_ready(coordinator)
    again = Coordinator(rules(), clock)
    ready = {one.shard_id: status_of(one, ShardState.READY, epoch_number=1) for one in (A, B, C)}
    for one in (A, B, C):
        assert await again.report(one, ready[one.shard_id])             # it asks for the epoch it does not know
    again = Coordinator(rules(), clock)
    assert await again.report(B, ready[B.shard_id])
    assert not await again.report(B, ready[B.shard_id], epoch)
    assert (await again.watch("", 0.0)).epoch == epoch                  # though A and C have yet to report
    for one in (A, C):
        assert not await again.report(one, ready[one.shard_id])
    view = await again.watch("", 0.0)
    assert (view.phase, view.epoch) == (GroupPhase.READY, epoch)


async def test_a_restart_goes_on_with_what_members_know_of_changes_and_orders(coordinator: Coordinator,
                                                                                clock: Clock) -> None:
    epoch = await bring_to_ready(coordinator)
    await coordinator.drain("node-c", "op")
    view = await coordinator.watch("", 0.0)
    again = Coordinator(rules(), clock)
    ready = [status_of(one, ShardState.READY, epoch_number=1) for one in (A, B, C)]
    assert (await again.watch("", 0.0)).remembered == NOTHING           # members know more
    assert await again.report(B, ready[1])
    assert not await again.report(B, ready[1], epoch, view.remembered)
    assert (await again.status()).membership_changes == (await coordinator.status()).membership_changes != ()
    for one, status in ((A, ready[0]), (C, ready[2])):
        await again.report(one, status)
    after = (await again.watch("", 0.0)).epoch                          # though C had yet to hear that it leaves
    assert after is not None and after.members == (A, B)
    assert (await again.drain("node-c", "op")).shard_ids == ("cpu-c",)
    assert (await again.watch("", 0.0)).remembered.orders == view.remembered.orders


async def test_sequences_that_routers_move_are_told_with_the_change_they_moved_for(coordinator: Coordinator) -> None:
    await bring_to_ready(coordinator)
    router = RouterReport("r", "node-a", "a:8", "a:9", 1, is_ready=True, num_moved={"sent": 5, "computed": 1})
    await coordinator.report_router(router)                             # it moved those for another coordinator
    await coordinator.report_router(replace(router, num_moved={"sent": 7, "computed": 1}))
    assert (await coordinator.status()).membership_changes[-1].moved == {"sent": 2}


async def test_after_a_restart_numbers_go_on(coordinator: Coordinator, clock: Clock) -> None:
    epoch = await bring_to_ready(coordinator)
    again = Coordinator(rules(), clock)
    await again.report(A, status_of(A, ShardState.BROKEN, epoch_number=1), epoch)
    assert (await again.watch("", 0.0)).epoch is None                   # B and C may be about to report
    clock.now_s += 11.0                                                 # they died with the old coordinator
    await again.report(A, status_of(A, ShardState.BROKEN, epoch_number=1), epoch)
    found = await planned(again)
    assert (found.number, found.members) == (2, (A,))


async def lose_c(coordinator: Coordinator) -> None:
    """While epoch 1 runs."""
    for one, lost in ((A, (C.shard_id,)), (B, ())):
        await coordinator.report(one, replace(status_of(one, ShardState.BROKEN, epoch_number=1), lost_peers=lost))


async def offer(coordinator: Coordinator, newcomer: Member) -> View:
    """Show what A and B see of one that comes when they have gone on in epoch 2."""
    for state in (ShardState.LOADED, ShardState.READY):
        for one in (A, B):
            await coordinator.report(one, status_of(one, state, epoch_number=2))
    await coordinator.report(newcomer, status_of(newcomer))
    view = await coordinator.watch("", 0.0)
    while view.coming is None:
        view = await coordinator.watch(view.key, 60.0)
    return view


async def test_newcomers_load_beside_the_running_epoch_and_are_then_taken_in(coordinator: Coordinator) -> None:
    await bring_to_ready(coordinator)
    await lose_c(coordinator)
    epoch = await planned(coordinator)
    assert (epoch.number, epoch.members) == (2, (A, B))                 # at once, though C reported a moment ago
    newcomer = member("c2")
    view = await offer(coordinator, newcomer)
    assert view.epoch is not None and (view.phase, view.epoch.number) == (GroupPhase.READY, 2)
    assert view.coming.members == (A, B, newcomer)
    assert not view.has_ended(2) and not view.has_withdrawn(3)
    held = epoch.placement.holders
    assert all(set(before) <= set(after) <= {*before, 2} for layer, later in zip(held, view.coming.placement.holders,
               strict=True) for before, after in zip(layer, later, strict=True)), "A and B load nothing for it"
    await coordinator.report(newcomer, status_of(newcomer, ShardState.LOADED, epoch_number=3))
    view = await coordinator.watch("", 0.0)
    assert view.epoch is not None and view.epoch.number == 3 and view.has_ended(2)


@pytest.mark.parametrize("is_first", [True, False], ids=["heard first", "heard last"])
async def test_a_restart_while_a_newcomer_loads_has_nobody_wait_for_it(coordinator: Coordinator, clock: Clock,
                                                                       is_first: bool) -> None:
    await bring_to_ready(coordinator)
    await lose_c(coordinator)
    epoch, newcomer = await planned(coordinator), member("c2")
    assert (await offer(coordinator, newcomer)).coming is not None
    again, loads = Coordinator(rules(), clock), replace(status_of(newcomer, ShardState.LOADING, 3), is_newcomer=True)
    told = [(newcomer, loads, None), *((one, status_of(one, ShardState.READY, 2), epoch) for one in (A, B))]
    for one, status, known in told if is_first else reversed(told):
        assert await again.report(one, status) == (one is A and is_first or one is B and not is_first)
        await again.report(one, status, known)
    view = await again.watch("", 0.0)
    assert (view.phase, view.epoch) == (GroupPhase.READY, epoch) and view.has_withdrawn(3)
    await again.report(newcomer, status_of(newcomer, ShardState.WAITING, 3))
    while view.coming is None:
        view = await again.watch(view.key, PATIENCE_S)
    assert view.coming.number > 3 and view.coming.members == (A, B, newcomer)


async def test_newcomers_alone_after_a_restart_begin_anew(clock: Clock) -> None:
    """Those who ran the epoch before are gone, and nobody can tell of it."""
    again = Coordinator(rules(1), clock)
    await again.report(A, replace(status_of(A, ShardState.LOADING, 3), is_newcomer=True))
    assert (await planned(again)).number == 4


async def test_a_newcomer_that_fails_leaves_the_running_epoch_alone(coordinator: Coordinator) -> None:
    epoch = await bring_to_ready(coordinator)
    await lose_c(coordinator)
    newcomer = member("c2")
    view = await offer(coordinator, newcomer)
    await coordinator.report(newcomer, status_of(newcomer, ShardState.FAILED, epoch_number=3, detail="bad weights"))
    view = await coordinator.watch("", 0.0)
    assert view.coming is None and view.epoch is not None and view.epoch.number == 2 and view.has_withdrawn(3)
    assert epoch.number == 1


async def test_silent_members_and_routers_are_forgotten(coordinator: Coordinator, clock: Clock) -> None:
    await bring_to_ready(coordinator)
    await coordinator.report_router(RouterReport("r", "node-a", "a:8", "a:9", epoch_number=1, is_ready=True))
    clock.now_s += 11.0
    status = await coordinator.status()
    assert not status.routers and "is gone" in status.view.why and "0 of 3" in status.view.why
    clock.now_s += 60.0
    assert not (await coordinator.status()).shards


# Changes of the placement.


def load_of(hot_expert: int, rows: float = 400.0) -> ExpertLoad:
    rows_LE = np.full((2, 6), 25.0, dtype=np.float32)
    rows_LE[:, hot_expert] = rows
    return ExpertLoad(2, 6, rows_LE.tobytes())


async def report_revision(coordinator: Coordinator, revision: int, **fields: int | str) -> None:
    for one in (A, B, C):
        status = replace(status_of(one, ShardState.READY, epoch_number=1), revision=revision,
                         prepared_revision=revision)
        await coordinator.report(one, replace(status, **fields))     # type: ignore[arg-type]


async def switch(coordinator: Coordinator) -> int:
    """All members do what the view says, until it says no more. Returns the revisions made."""
    num_made = 0
    while (prepared := (await coordinator.watch("", 0.0)).next) is not None:
        await report_revision(coordinator, prepared.revision)
        num_made += 1
    return num_made


async def test_a_change_is_prepared_then_runs_and_is_remembered(coordinator: Coordinator) -> None:
    before = await bring_to_ready(coordinator)
    await coordinator.report_expert_load(A.shard_id, load_of(hot_expert=1), None)
    change = await coordinator.change_placement("op", "hot", None)
    assert (change.state, change.first_revision) == ("running", 0)
    view = await coordinator.watch("", 0.0)
    assert view.next is not None and (view.next.number, view.next.revision) == (1, 1)
    assert view.epoch is not None and view.epoch.placement == before.placement      # it still serves
    assert await switch(coordinator) >= 1
    status = await coordinator.placement()
    done = find(status.epoch, "op")
    assert done is not None and done.state == "done" and status.next_revision is None
    assert status.epoch.placement != before.placement and status.epoch.revision == done.last_revision
    assert status.load.rows().tolist() == load_of(1).rows().tolist()


async def test_the_same_operation_twice_is_one_change(coordinator: Coordinator) -> None:
    await bring_to_ready(coordinator)
    await coordinator.report_expert_load(A.shard_id, load_of(hot_expert=1), None)
    first = await coordinator.change_placement("op", "hot", None)
    assert await coordinator.change_placement("op", "again", None) == first
    with pytest.raises(PlacementError, match="op is under way"):
        await coordinator.change_placement("other", "", None)
    num_made = await switch(coordinator)
    again = await coordinator.change_placement("op", "again", None)
    assert again.state == "done" and again.last_revision == num_made
    assert (await coordinator.watch("", 0.0)).next is None


async def test_a_given_placement_is_checked_and_applied(coordinator: Coordinator) -> None:
    await bring_to_ready(coordinator)
    given = Placement(3, (((0,), (0,), (1,), (1,), (2,), (0, 1, 2)),) * 2)
    for wrong, message in [(Placement(2, (((0,),) * 6,) * 2), "is for 2 members"),
                           (Placement(3, (((0,),) * 5,) * 2), "the model 2 of 6"),
                           (Placement(3, ()), "the model 2 of 6")]:
        with pytest.raises(PlacementError, match=message):
            await coordinator.change_placement("wrong", "", wrong)
    await coordinator.change_placement("mine", "", given)
    await switch(coordinator)
    epoch = (await coordinator.placement()).epoch
    assert epoch.placement.holders == given.holders and epoch.figures is not None and epoch.figures.solver == "given"


async def test_a_member_that_cannot_prepare_leaves_everything_as_it_was(coordinator: Coordinator) -> None:
    before = await bring_to_ready(coordinator)
    await coordinator.change_placement("op", "", Placement(3, (((0, 1, 2),) * 6,) * 2))
    await coordinator.report(
        B, replace(status_of(B, ShardState.READY, epoch_number=1), failed_revision=1, detail="no room"))
    view = await coordinator.watch("", 0.0)
    assert view.next is None and view.epoch is not None and view.epoch.placement == before.placement
    failed = find(view.epoch, "op")
    assert failed is not None and failed.state == "failed" and "no room" in failed.detail
    assert (await coordinator.change_placement("op", "", Placement(3, (((0, 1),) * 6,) * 2))).state == "running"


async def test_a_member_that_never_prepares_ends_the_change(coordinator: Coordinator, clock: Clock) -> None:
    await bring_to_ready(coordinator)
    await coordinator.change_placement("op", "", Placement(3, (((0, 1),) * 6,) * 2))
    for _ in range(70):
        clock.now_s += 9.0
        await report_revision(coordinator, 0)
    failed = find((await coordinator.placement()).epoch, "op")
    assert failed is not None and failed.state == "failed" and "cpu-b has not prepared it in time" in failed.detail
    assert (await coordinator.watch("", 0.0)).next is None


async def test_rebalancing_waits_for_a_gain_above_the_margin(clock: Clock) -> None:
    coordinator = Coordinator(rules(config=PlacementConfig(rebalance_margin=0.01, context_tokens=1)), clock)
    await bring_to_ready(coordinator)
    assert await coordinator.rebalance() is None                    # nothing was counted
    await coordinator.report_expert_load(A.shard_id, load_of(hot_expert=0, rows=25.0), None)
    assert await coordinator.rebalance() is None                    # even loads: the running placement is right
    await coordinator.report_expert_load(A.shard_id, load_of(hot_expert=1, rows=500.0), None)
    change = await coordinator.rebalance()
    assert change is not None and change.operation_id == "auto-1-0" and "faster" in change.why
    assert await coordinator.rebalance() is None                    # one at a time
    await switch(coordinator)
    assert await coordinator.rebalance() is None                    # it is as good as it gets


async def test_rebalancing_leaves_a_given_placement_and_a_failed_change_alone(clock: Clock) -> None:
    coordinator = Coordinator(rules(config=PlacementConfig(rebalance_margin=0.01, context_tokens=1)), clock)
    await bring_to_ready(coordinator)
    await coordinator.report_expert_load(A.shard_id, load_of(hot_expert=1, rows=500.0), None)
    assert await coordinator.rebalance() is not None
    await coordinator.report(
        B, replace(status_of(B, ShardState.READY, epoch_number=1), failed_revision=1, detail="no room"))
    await coordinator.report_expert_load(A.shard_id, load_of(hot_expert=1, rows=900.0), None)
    assert await coordinator.rebalance() is None
    await coordinator.change_placement("mine", "", Placement(3, (((0,), (1,), (2,), (0,), (1,), (2,)),) * 2))
    await switch(coordinator)
    await coordinator.report_expert_load(A.shard_id, load_of(hot_expert=1, rows=2000.0), None)
    assert await coordinator.rebalance() is None


async def test_without_anything_better_the_placement_stays(coordinator: Coordinator) -> None:
    before = await bring_to_ready(coordinator)
    change = await coordinator.change_placement("op", "", None)
    assert change.moved_bytes == 0 and await switch(coordinator) == 1
    assert (await coordinator.placement()).epoch.placement == before.placement


async def test_plans_count_the_link_that_was_measured_after_the_start(coordinator: Coordinator) -> None:
    before = await bring_to_ready(coordinator)
    slow = Link(latency_s=0.01, bytes_per_s=1e9)
    for one in (A, B, C):
        assert one.profile is not None
        measured = replace(one, profile=replace(one.profile, link=slow))
        await coordinator.report(measured, status_of(one, ShardState.READY, epoch_number=1))
    await coordinator.change_placement("mine", "", Placement(3, (((0,), (1,), (2,), (0,), (1,), (2,)),) * 2))
    await switch(coordinator)
    figures = (await coordinator.placement()).epoch.figures
    assert figures is not None and before.figures is not None
    assert figures.step_s > before.figures.step_s + 2 * 2 * slow.latency_s * 0.9      # two layers of two collectives


async def test_a_new_coordinator_gives_out_other_revision_numbers(coordinator: Coordinator, clock: Clock) -> None:
    """The old one may have named a revision that a member still prepares."""
    epoch = await bring_to_ready(coordinator)
    numbers = set()
    for _ in range(3):
        again = Coordinator(rules(), clock)
        for one in (A, B, C):
            await again.report(one, status_of(one, ShardState.READY, epoch_number=1), epoch)
        await again.change_placement("op", "", Placement(3, (((0, 1),) * 6,) * 2))
        prepared = (await again.watch("", 0.0)).next
        assert prepared is not None
        numbers.add(prepared.revision)
    assert len(numbers) == 3


async def test_who_watches_hears_of_an_adopted_revision(coordinator: Coordinator) -> None:
    epoch = await bring_to_ready(coordinator)
    seen = (await coordinator.watch("", 0.0)).key
    watcher = asyncio.create_task(coordinator.watch(seen, 60.0))
    await asyncio.sleep(0)
    later = replace(epoch, revision=7, placement=Placement(3, (((0, 1),) * 6,) * 2))
    status = replace(status_of(A, ShardState.READY, epoch_number=1), revision=7, prepared_revision=7)
    await coordinator.report(A, status, later)
    view = await asyncio.wait_for(watcher, PATIENCE_S)
    assert view.epoch == later


async def test_a_restarted_coordinator_goes_on_with_a_change(coordinator: Coordinator, clock: Clock) -> None:
    """One layer at a time, for the members have no room: the first stage runs when the coordinator is gone."""
    await bring_to_ready(coordinator)
    await report_revision(coordinator, 0, resident_bytes=1_000_000)
    target = Placement(3, (((0, 1),) * 6,) * 2)
    await coordinator.change_placement("op", "", target)
    first = (await coordinator.watch("", 0.0)).next
    assert first is not None and first.placement.holders.count(target.holders[0]) == 1
    again = Coordinator(rules(), clock)
    ready = [replace(status_of(one, ShardState.READY, epoch_number=1), revision=1, prepared_revision=1)
             for one in (A, B, C)]
    assert await again.report(A, ready[0])                          # it asks for what it does not know
    await again.report(A, ready[0], first)
    for one, status in zip((B, C), ready[1:], strict=True):
        assert not await again.report(one, status)
    assert await switch(again) == 1
    epoch = (await again.placement()).epoch
    assert epoch.placement.holders == target.holders
    assert [change.state for change in epoch.changes] == ["done"]


def rows_of(placement: Placement) -> list[float]:
    """The part of even loads that each member computes."""
    splits = split_by_rates(placement, np.full((2, 6), 85))
    return np.sum([split_matrix(holders, split, 3).sum(axis=0)
                   for holders, split in zip(placement.holders, splits, strict=True)], axis=0).tolist()


async def report_work(coordinator: Coordinator, *experts: float) -> None:
    """Even loads, and how much longer than its profile says each member takes for experts."""
    for one, ratio in zip((A, B, C), experts, strict=True):
        await coordinator.report_expert_load(one.shard_id, load_of(hot_expert=0, rows=25.0), WorkRatio(1.0, ratio, 50))


async def test_a_member_that_is_slower_than_its_profile_is_asked_for_less(coordinator: Coordinator) -> None:
    before = await bring_to_ready(coordinator)
    await report_work(coordinator, 1.0, 2.0, 1.0)
    await coordinator.change_placement("op", "slow b", None)
    await switch(coordinator)
    status = await coordinator.placement()
    of_a, of_b, of_c = rows_of(status.epoch.placement)
    assert of_b < min(of_a, of_c) and status.epoch.placement.rates != before.placement.rates
    assert [ratio.experts for ratio in status.ratios if ratio] == [1.0, 2.0, 1.0]
    assert status.epoch.members == before.members       # the profiles that the ratios refer to


async def test_rebalancing_moves_experts_off_a_slow_member(clock: Clock) -> None:
    coordinator = Coordinator(rules(config=PlacementConfig(rebalance_margin=0.02, context_tokens=1)), clock)
    await bring_to_ready(coordinator)
    await report_work(coordinator, 1.0, 1.0, 1.0)
    assert await coordinator.rebalance() is None
    await report_work(coordinator, 1.0, 3.0, 1.0)
    assert await coordinator.rebalance() is None                    # no rows were counted since
    await coordinator.report_expert_load(A.shard_id, load_of(hot_expert=0, rows=30.0), WorkRatio(1.0, 1.0, 60))
    change = await coordinator.rebalance()
    assert change is not None and change.why.endswith("% faster for the counted load and measured work")
    await switch(coordinator)
    of_a, of_b, of_c = rows_of((await coordinator.placement()).epoch.placement)
    assert of_b < min(of_a, of_c)


async def test_work_that_became_unknown_is_planned_by_the_profile(coordinator: Coordinator) -> None:
    before = await bring_to_ready(coordinator)
    await report_work(coordinator, 1.0, 2.0, 1.0)
    for one in (A, B, C):
        await coordinator.report_expert_load(one.shard_id, load_of(hot_expert=0, rows=25.0), None)
    assert (await coordinator.placement()).ratios == (None, None, None)
    change = await coordinator.change_placement("op", "", None)
    await switch(coordinator)
    assert change.moved_bytes == 0 and (await coordinator.placement()).epoch.placement == before.placement


async def test_without_a_ready_group_there_is_nothing_to_change(coordinator: Coordinator) -> None:
    with pytest.raises(NotReadyError, match="0 of 3"):
        await coordinator.change_placement("op", "", None)
    with pytest.raises(NotReadyError, match="no placement yet"):
        await coordinator.placement()
