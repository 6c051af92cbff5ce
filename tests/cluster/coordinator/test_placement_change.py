"""A change of placement, report by report."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.coordinator.placement_change import (
    PREPARE_TIMEOUT_S,
    AwaitedRevision,
    ChangeState,
    advance,
    begin,
    find,
    next_stage,
    num_moved,
    running_change,
)
from model.placement import Placement
from serving.link.epoch import Epoch, PlanFigures, PlannedPlacement, RequestShare, ShardStatus
from tests.cluster.coordinator.group_reports import member

EXPERT_BYTES = 100
MEMBERS = (member("a"), member("b"))
OLD = Placement(2, (((0,), (0,), (1,)),) * 3)
NEW = Placement(2, (((0,), (1,), (0, 1)),) * 3)
SHARES = (RequestShare(0.75, 64), RequestShare(0.25, 32))
TARGET = PlannedPlacement(NEW, SHARES, PlanFigures(64, 100, 0.5, 0.4, "compute", "exact"))
EPOCH = Epoch(4, MEMBERS, OLD, "tcp://x:1", shares=(RequestShare(0.5, 64),) * 2)


def statuses(revision: int, prepared: int | None = None, failed: tuple[int, int] = (0, 0),
             detail: str = "") -> list[ShardStatus]:
    return [ShardStatus(one.shard_id, 4, "ready", revision=revision, detail=detail,
                        prepared_revision=revision if prepared is None else prepared, failed_revision=failed[rank])
            for rank, one in enumerate(MEMBERS)]


def run(room_bytes: int) -> list[Epoch]:
    """The revisions that a change goes through when all goes well."""
    state = ChangeState(begin(EPOCH, "op", "because", TARGET, EXPERT_BYTES), None)
    epochs = []
    while True:
        state = advance(state, statuses(state.epoch.revision), [room_bytes] * 2, EXPERT_BYTES)
        if state.next is None:
            return epochs
        waiting = advance(state, statuses(state.epoch.revision, state.next.revision), [room_bytes] * 2, EXPERT_BYTES)
        assert waiting == state         # prepared is not switched
        epochs.append(state.next)
        state = advance(state, statuses(state.next.revision), [room_bytes] * 2, EXPERT_BYTES)
        assert state.epoch.revision == epochs[-1].revision


def test_with_room_for_all_a_change_is_one_revision() -> None:
    (epoch,) = run(room_bytes=10_000)
    assert (epoch.number, epoch.revision, epoch.placement, epoch.shares) == (4, 1, NEW, SHARES)
    assert epoch.figures == TARGET.figures
    change = find(epoch, "op")
    assert change is not None and (change.state, change.moved_bytes, change.target) == ("done", 600, None)


def test_without_room_it_goes_layer_by_layer_and_shares_change_with_the_last() -> None:
    epochs = run(room_bytes=0)
    assert [epoch.revision for epoch in epochs] == [1, 2, 3]
    assert [epoch.placement.holders.count(NEW.holders[0]) for epoch in epochs] == [1, 2, 3]
    assert [epoch.shares for epoch in epochs] == [EPOCH.shares, EPOCH.shares, SHARES]
    assert [running_change(epoch) is None for epoch in epochs] == [False, False, True]


def test_a_member_that_cannot_prepare_ends_the_change_and_says_why() -> None:
    state = advance(ChangeState(begin(EPOCH, "op", "", TARGET, EXPERT_BYTES), None), statuses(0), [0, 0],
                    EXPERT_BYTES)
    assert state.next is not None
    state = advance(state, statuses(0, failed=(0, 1), detail="7 bytes are missing"), [0, 0], EXPERT_BYTES)
    change = find(state.epoch, "op")
    assert state.next is None and state.epoch.placement == OLD and change is not None
    assert (change.state, change.detail) == ("failed", "shard cpu-b: 7 bytes are missing")


def test_a_failed_revision_is_not_used_again() -> None:
    """Or a member that had prepared it would take the other one for the same."""
    again = begin(EPOCH, "op2", "", TARGET, EXPERT_BYTES)
    state = advance(ChangeState(again, None), statuses(0, prepared=3, failed=(0, 4)), [0, 0], EXPERT_BYTES)
    assert state.next is not None and state.next.revision == 5


def test_a_failed_operation_may_be_tried_again_under_its_id() -> None:
    failed = replace(EPOCH, changes=(replace(begin(EPOCH, "op", "", TARGET, 1).changes[0], state="failed"),))
    assert [change.state for change in begin(failed, "op", "", TARGET, 1).changes] == ["running"]


def test_a_restarted_coordinator_goes_on_from_any_members_epoch() -> None:
    """The stages after the first carry the change with its target."""
    first = run(room_bytes=0)[0]
    state = advance(ChangeState(first, None), statuses(1), [10_000] * 2, EXPERT_BYTES)
    assert state.next is not None and state.next.placement == NEW


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, Placement, list[int]]:
    num_members, num_layers = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ranks = st.lists(st.integers(0, num_members - 1), min_size=1, unique=True).map(lambda some: tuple(sorted(some)))
    layers = st.lists(st.tuples(ranks, ranks), min_size=num_layers, max_size=num_layers).map(tuple)
    rooms = draw(st.lists(st.integers(0, 500), min_size=num_members, max_size=num_members))
    return Placement(num_members, draw(layers)), Placement(num_members, draw(layers)), rooms


@given(placements())
def test_stages_reach_the_target_within_the_room(case: tuple[Placement, Placement, list[int]]) -> None:
    running, target, rooms = case
    for _ in range(target.num_layers):
        if running.holders == target.holders:
            break
        stage = next_stage(running, target, rooms, EXPERT_BYTES)
        changed = [layer for layer in range(target.num_layers) if stage.holders[layer] != running.holders[layer]]
        assert changed and all(stage.holders[layer] == target.holders[layer] for layer in changed)
        for rank, room in enumerate(rooms):
            new = sum(len(stage.experts_of(layer, rank)) for layer in changed
                      if stage.experts_of(layer, rank) != running.experts_of(layer, rank))
            assert len(changed) == 1 or new * EXPERT_BYTES <= room
        running = stage
    assert running.holders == target.holders and num_moved(running, target) == 0


def test_a_revision_is_late_when_its_time_is_over_and_another_one_starts_anew() -> None:
    one, other = replace(EPOCH, revision=5), replace(EPOCH, revision=6)
    awaited = AwaitedRevision().followed_by(one, 100.0)
    assert awaited.followed_by(one, 200.0).followed_by(None, 300.0) == awaited
    assert not awaited.is_late(one, 100.0 + PREPARE_TIMEOUT_S) and awaited.is_late(one, 100.1 + PREPARE_TIMEOUT_S)
    assert not awaited.is_late(None, 1e9) and not awaited.is_late(other, 1e9)
    assert not awaited.followed_by(other, 1e9).is_late(other, 1e9)
