"""What changed the members, who it was, and how long each part took."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator.membership_history import MAX_CHANGES, MembershipHistory, Seen
from cluster.coordinator.reports import Report
from cluster.coordinator.view import GroupPhase, MembershipChange, ShardState, View
from serving.link.epoch import Epoch, Member
from tests.cluster.coordinator.group_reports import member, report
from tests.placements import contiguous_placement, even_shares

A, B, C, D = (member(name) for name in "abcd")


def epoch_of(number: int, *members: Member) -> Epoch:
    count = len(members)
    return Epoch(number, members, contiguous_placement(1, count, (1,) * count), "", even_shares(count))


class Group:
    """A history that is shown one view after the other."""

    def __init__(self) -> None:
        self.history = MembershipHistory(now_s=100.0, at_s=1e9)
        self.now_s = 100.0

    def see(self, at_s: float, view: View, *reports: Report, why: str = "") -> MembershipChange | None:
        """Look when `at_s` have passed since the beginning."""
        return self.history.observe(Seen(view, reports, why, 100.0 + at_s, 1e9 + at_s))

    def start(self, epoch: Epoch) -> None:
        for at_s, phase in ((1.0, GroupPhase.LOADING), (2.0, GroupPhase.JOINING), (2.5, GroupPhase.READY)):
            self.see(at_s, View(phase, epoch), *ready(epoch))


def ready(epoch: Epoch) -> list[Report]:
    return [report(one, ShardState.READY, epoch.number, at_s=102.5) for one in epoch.members]


def test_the_first_start_is_told_from_when_the_coordinator_began() -> None:
    group, epoch = Group(), epoch_of(1, A, B)
    assert group.see(0.5, View(GroupPhase.WAITING, None, "1 of 2 shards are here")) is None
    group.start(epoch)
    assert group.history.changes == (MembershipChange(
        0, 1, "start", (A.shard_id, B.shard_id), 1e9, None, 1000.0, 2000.0, 2500.0),)
    assert group.history.changes[0].pause_s is None


def test_a_death_is_timed_from_the_first_report_of_it() -> None:
    group, first, second = Group(), epoch_of(1, A, B, C), epoch_of(2, A, B)
    group.start(first)
    lost = [replace(one, status=replace(one.status, state=ShardState.WAITING, lost_peers=(C.shard_id,)))
            for one in ready(first)[:2]]
    group.see(10.0, View(GroupPhase.READY, first), lost[0], ready(first)[1])
    group.see(10.02, View(GroupPhase.WAITING, None), *lost, why="epoch 1 ended")
    assert group.history.changes[-1].epoch_after == 0 and group.history.changes[-1].pause_s is None
    group.see(10.03, View(GroupPhase.LOADING, second), *lost)
    group.see(10.05, View(GroupPhase.JOINING, second), *lost)
    change = group.see(10.08, View(GroupPhase.READY, second), *ready(second))
    assert change == MembershipChange(1, 2, "died", (C.shard_id,), pytest.approx(1e9 + 10.02), 20.0, 30.0, 50.0, 80.0,
                                      "epoch 1 ended")
    assert change.pause_s == pytest.approx(0.08) and group.history.changes[-1] == change


def test_silence_is_timed_from_when_it_was_last_heard() -> None:
    group, first, second = Group(), epoch_of(1, A, B, C), epoch_of(2, A, B)
    group.start(first)
    silent = replace(ready(first)[2], at_s=107.0)
    group.see(10.0, View(GroupPhase.WAITING, None), *ready(first)[:2], silent)
    change = group.see(10.1, View(GroupPhase.READY, second), *ready(second))
    assert change is not None and (change.cause, change.shard_ids) == ("hung", (C.shard_id,))
    assert (change.detected_ms, change.regrouped_ms, change.resumed_ms) == (3000.0, 3100.0, 3100.0)


def test_who_was_kept_out_for_a_quarrel_is_cut_off_and_not_dead() -> None:
    group, first, third = Group(), epoch_of(1, A, B, C), epoch_of(3, A, B)
    group.start(first)
    quarrel = [replace(one, status=replace(one.status, state=ShardState.BROKEN, lost_peers=(C.shard_id,)))
               for one in ready(first)]
    group.see(10.0, View(GroupPhase.LOADING, epoch_of(2, A, B, C)), *quarrel)
    seen = Seen(View(GroupPhase.READY, third, "2 members go on without cpu-c"), tuple(quarrel), "", 112.0, 1e9,
                frozenset({C.shard_id}))
    change = group.history.observe(seen)
    assert change is not None and (change.cause, change.shard_ids) == ("cut_off", (C.shard_id,))
    assert change.detail == "2 members go on without cpu-c"


def test_whoever_dies_meanwhile_belongs_to_the_same_change() -> None:
    group, first, third = Group(), epoch_of(1, A, B, C), epoch_of(3, A)
    group.start(first)
    failed = report(C, ShardState.FAILED, 1)
    group.see(10.0, View(GroupPhase.LOADING, epoch_of(2, A, B)), failed)
    group.see(11.0, View(GroupPhase.WAITING, None), report(B, ShardState.FAILED, 2))
    change = group.see(12.0, View(GroupPhase.READY, third), *ready(third))
    assert change is not None and (change.epoch_before, change.epoch_after) == (1, 3)
    assert (change.cause, change.shard_ids, change.regrouped_ms) == ("died", (B.shard_id, C.shard_id), 2000.0)


@pytest.mark.parametrize(("after", "leaving", "cause", "shard_ids"), [
    ((A, B, C, D), (), "joined", (D.shard_id,)),
    ((A, B), (C.shard_id,), "drained", (C.shard_id,)),
    ((A, B, D), (C.shard_id,), "resized", (C.shard_id,)),
])
def test_a_planned_change_stands_still_only_from_the_switch(after: tuple[Member, ...], leaving: tuple[str, ...],
                                                           cause: str, shard_ids: tuple[str, ...]) -> None:
    group, first, second = Group(), epoch_of(1, A, B, C), epoch_of(2, *after)
    group.start(first)
    group.see(20.0, View(GroupPhase.READY, first, coming=second, leaving=leaving), *ready(first))
    group.see(29.0, View(GroupPhase.READY, first, coming=second, leaving=leaving), *ready(first))
    group.see(30.0, View(GroupPhase.JOINING, second), *ready(first))
    change = group.see(30.01, View(GroupPhase.READY, second), *ready(second))
    assert change is not None and (change.cause, change.shard_ids, change.resumed_ms) == (cause, shard_ids, 10_010.0)
    assert change.pause_s == pytest.approx(0.01)


def test_a_group_that_broke_and_goes_on_with_all_its_members_says_so() -> None:
    group, first, second = Group(), epoch_of(1, A, B), epoch_of(2, A, B)
    group.start(first)
    group.see(10.0, View(GroupPhase.WAITING, None), *ready(first))
    change = group.see(10.5, View(GroupPhase.READY, second), *ready(second))
    assert change is not None and (change.cause, change.shard_ids, change.pause_s) == ("broke", (), 0.5)


def test_a_revision_and_a_running_epoch_of_another_coordinator_are_no_changes() -> None:
    group, epoch = Group(), epoch_of(7, A, B)
    group.history.adopt(epoch, ())
    assert group.see(1.0, View(GroupPhase.READY, epoch), *ready(epoch)) is None
    assert group.see(2.0, View(GroupPhase.READY, replace(epoch, revision=1)), *ready(epoch)) is None
    assert group.history.changes == ()


def test_the_latest_are_remembered() -> None:
    group = Group()
    for number in range(1, 40):
        epoch = epoch_of(number, *((A, B) if number % 2 else (A, B, C)))
        group.see(float(number), View(GroupPhase.READY, epoch), *ready(epoch))
    changes = group.history.changes
    assert [change.epoch_after for change in changes] == list(range(40 - MAX_CHANGES, 40))


def test_changes_that_a_member_knows_are_told_by_the_next_coordinator() -> None:
    group, first = Group(), epoch_of(1, A, B, C)
    group.start(first)
    under_way = MembershipChange(1, 0, "broke", (), 1e9)
    next_one = MembershipHistory(now_s=200.0, at_s=2e9)
    next_one.adopt(first, (*group.history.changes, under_way))
    next_one.adopt(first, group.history.changes)        # another member tells the same
    assert next_one.changes == group.history.changes


def test_sequences_that_moved_belong_to_the_change_that_moved_them() -> None:
    group, first, second, third = Group(), epoch_of(1, A, B, C), epoch_of(2, A, B), epoch_of(3, A)
    history = group.history
    group.start(first)
    history.note_moved("r", {"sent": 0, "computed": 3})         # for a coordinator before this one
    group.see(10.0, View(GroupPhase.READY, first, leaving=(C.shard_id,)), *ready(first))
    history.note_moved("r", {"sent": 2, "computed": 3})
    group.see(11.0, View(GroupPhase.READY, second), *ready(second)[:2])
    assert history.changes[-1].cause == "drained" and history.changes[-1].moved == {"sent": 2}
    group.see(12.0, View(GroupPhase.LOADING, third), report(B, ShardState.FAILED, 2))
    history.note_moved("r", {"sent": 2, "computed": 4})
    group.see(13.0, View(GroupPhase.READY, third), *ready(third))
    history.note_moved("r", {"sent": 2, "computed": 5})         # computed since
    history.note_moved("other", {"computed": 9})
    assert [change.moved for change in history.changes] == [{}, {"sent": 2}, {"computed": 2}]
    history.forget_router("r")
    history.note_moved("r", {"computed": 7})
    assert history.changes[-1].moved == {"computed": 2}
