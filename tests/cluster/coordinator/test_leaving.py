"""Members that are told to leave: the right ones, only where the others suffice, and once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.leaving import check_others_suffice, find_leaving, progress, slots_without
from cluster.coordinator.membership import HAND_OVER_S
from cluster.coordinator.reports import Report
from cluster.coordinator.view import GroupPhase, LeaveOrder, ShardState, View
from cluster.planner.layer.error import PlacementError
from model.placement import Placement
from serving.link.epoch import Epoch, Member
from tests.cluster.coordinator.group_reports import member, rules, status_of
from tests.cluster.coordinator.test_membership import first_epoch
from tests.placements import contiguous_placement

BUDGET = 1_000_000
A, B, C = (member(name, budget=BUDGET) for name in "abc")
SINGLE = contiguous_placement(2, 6, (2, 2, 2))


def test_a_shard_or_all_shards_of_a_node_are_meant() -> None:
    beside = replace(B, shard_id="cpu-b2")
    assert find_leaving("cpu-b", (A, B, C, beside)) == ("cpu-b",)
    assert find_leaving("node-b", (A, B, C, beside)) == ("cpu-b", "cpu-b2") == find_leaving("id-b", (beside, B))


def test_names_that_are_not_known_are_answered_with_those_that_are() -> None:
    with pytest.raises(PlacementError) as raised:
        find_leaving("node-x", (B, A))
    assert "no shard or node 'node-x'" in str(raised.value)
    assert "shard cpu-a on node node-a; shard cpu-b on node node-b" in str(raised.value)


def test_the_others_must_be_able_to_hold_the_model() -> None:
    tight = replace(first_epoch(), members=tuple(member(name, budget=730) for name in "abc"))
    check_others_suffice(tight, {"cpu-c"}, rules().plan)
    with pytest.raises(PlacementError, match="600 bytes are missing"):
        check_others_suffice(tight, {"cpu-b", "cpu-c"}, rules().plan)
    with pytest.raises(PlacementError, match="nobody would be left"):
        check_others_suffice(tight, {"cpu-a", "cpu-b", "cpu-c"}, rules().plan)


def test_who_leaves_may_hold_nothing() -> None:
    assert slots_without(first_epoch(), {"cpu-b"}, (3, 4, 5)) == (3, 0, 5)


def test_it_is_done_when_the_group_goes_on_without() -> None:
    begun = LeaveOrder("op", "cpu-c", ("cpu-c",))
    epoch = replace(first_epoch(), placement=SINGLE)
    assert progress(begun, View(GroupPhase.READY, epoch), {}).num_experts == 4
    elsewhere = replace(epoch, placement=Placement(3, (((0,), (0,), (0,), (1,), (1,), (1, 2)),) * 2))
    still_there = progress(begun, View(GroupPhase.READY, elsewhere), {})
    assert (still_there.is_done, still_there.num_experts) == (False, 0)
    without = replace(epoch, members=(A, B), placement=Placement(2, (((0,),) * 6,) * 2), shares=epoch.shares[:2])
    assert progress(begun, View(GroupPhase.READY, without), {}).is_done
    carries = {C.shard_id: Report(C, replace(status_of(C, ShardState.READY, 1), num_running=2), 0.0)}
    assert "2 requests go on there" in progress(begun, View(GroupPhase.READY, without), carries).detail
    assert progress(begun, View(GroupPhase.WAITING, None), {}).is_done


async def bring_to_ready(coordinator: Coordinator, epoch_number: int = 1) -> Epoch:
    for state in (ShardState.WAITING, ShardState.LOADED, ShardState.READY):
        for one in (A, B, C):
            await coordinator.report(one, status_of(one, state, 0 if state is ShardState.WAITING else epoch_number))
        view = await coordinator.watch("", 0.0)
        while view.epoch is None:
            view = await coordinator.watch(view.key, 60.0)
    assert view.phase is GroupPhase.READY
    return view.epoch


async def take(coordinator: Coordinator, *members: Member, num_running: int = 0) -> None:
    """Report that the members have made every stage of what is prepared."""
    view = await coordinator.watch("", 0.0)
    while view.next is not None:
        for one in members:
            await coordinator.report(one, replace(status_of(one, ShardState.READY, 1), revision=view.next.revision,
                                                  num_running=num_running))
        view = await coordinator.watch("", 0.0)


async def test_a_drain_moves_experts_and_is_one_operation_however_often_it_is_asked_for() -> None:
    times_s = [100.0]
    coordinator = Coordinator(rules(), lambda: times_s[-1])
    await bring_to_ready(coordinator)
    await coordinator.change_placement("single", "one copy of each", SINGLE)
    await take(coordinator, A, B, C)
    begun = await coordinator.drain("node-c", "op")
    assert not begun.is_done and begun.num_experts == 4
    view = await coordinator.watch("", 0.0)
    assert view.leaving == ("cpu-c",) and view.next is not None and not view.has_ended(1)
    assert await coordinator.drain("node-c", "op") == begun
    await take(coordinator, A, B, C, num_running=2)
    view = await coordinator.watch("", 0.0)
    assert view.epoch is not None and view.epoch.number == 1 and "2 requests of cpu-c go over to others" in view.why
    times_s.append(100.0 + HAND_OVER_S)                 # they take too long
    view = await coordinator.watch("", 0.0)
    assert view.epoch is not None and (view.epoch.number, view.epoch.members) == (2, (A, B)) and view.has_ended(1)
    moved = await coordinator.drain("node-c", "op")
    assert (moved.is_done, moved.num_experts, moved.num_requests) == (False, 0, 2)
    await coordinator.report(C, replace(status_of(C, ShardState.WAITING, 1), is_leaving=True))
    assert (await coordinator.drain("node-c", "op")).is_done
    assert (await coordinator.watch("", 0.0)).coming is None            # nor is it taken in again


async def test_a_drain_that_cannot_be_changes_nothing() -> None:
    coordinator = Coordinator(rules(), lambda: 100.0)
    await bring_to_ready(coordinator)
    await coordinator.drain("cpu-a", "first")
    await take(coordinator, A, B, C)
    await coordinator.drain("cpu-b", "second")
    with pytest.raises(PlacementError, match="nobody would be left"):
        await coordinator.drain("cpu-c", "third")
    assert "cpu-c" not in (await coordinator.watch("", 0.0)).leaving


async def test_who_is_told_to_leave_is_not_taken_in() -> None:
    coordinator = Coordinator(rules(), lambda: 100.0)
    for one in (A, B):
        await coordinator.report(one, status_of(one))
    assert (await coordinator.drain("cpu-b", "op")).is_done
    await coordinator.report(C, status_of(C))
    view = await coordinator.watch("", 0.0)
    assert view.epoch is None and "2 of 3 shards are here (node-a, node-c)" in view.why
