"""A member that is told to go: first nobody needs it any more, then the group goes on without it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from cluster.coordinator.evacuation import leave_id
from cluster.coordinator.membership import HAND_OVER_S, GroupSnapshot, decide
from cluster.coordinator.placement_change import running_change
from cluster.coordinator.reports import Report
from cluster.coordinator.view import GroupPhase, ShardState, View
from model.placement import Placement
from serving.link.epoch import Epoch, Member
from tests.cluster.coordinator.group_reports import member, report, rules
from tests.placements import even_shares

A, B, C, D = (member(name) for name in "abcd")
ONE_COPY = Placement(3, (((0,), (0,), (1,), (1,), (2,), (2,)),) * 2)
TWO_COPIES = Placement(3, (((0, 1), (0, 2), (1, 2), (0, 1), (0, 2), (1, 2)),) * 2)


def epoch_of(placement: Placement = ONE_COPY, members: tuple[Member, ...] = (A, B, C), number: int = 1) -> Epoch:
    return Epoch(number, members, placement, "tcp://a:2", even_shares(len(members)))


def reports_of(epoch: Epoch, leaving: Iterable[Member] = (), state: ShardState = ShardState.READY) -> list[Report]:
    return [_leaves(report(one, state, epoch.number), one in leaving) for one in epoch.members]


def _leaves(of: Report, is_leaving: bool = True) -> Report:
    return replace(of, status=replace(of.status, is_leaving=is_leaving, resident_bytes=300))


def decided(reports: Iterable[Report], epoch: Epoch | None, num_members: int = 3) -> View:
    number = epoch.number if epoch else 0
    return decide(GroupSnapshot(tuple(reports), epoch, number, number, 0.0, last=epoch), rules(num_members)).view


def test_with_copies_everywhere_the_next_epoch_begins_at_once() -> None:
    epoch = epoch_of(TWO_COPIES)
    view = decided(reports_of(epoch, leaving=(B,)), epoch)
    assert view.phase is GroupPhase.LOADING and view.ended_epoch_number == 1 and view.leaving == (B.shard_id,)
    assert view.epoch is not None and view.epoch.number == 2 and view.epoch.members == (A, C)
    assert view.epoch.placement.holders == (((0,), (0, 1), (1,), (0,), (0, 1), (1,)),) * 2     # nothing is loaded


@pytest.mark.parametrize(("num_running", "since_s", "goes"), [(2, 0.0, False), (0, 0.0, True), (2, -HAND_OVER_S, True)])
def test_its_sequences_have_a_while_to_go_over_to_others(num_running: int, since_s: float, goes: bool) -> None:
    epoch = epoch_of(TWO_COPIES)
    reports = [replace(one, status=replace(one.status, num_running=num_running))
               for one in reports_of(epoch, leaving=(B,))]
    view = decide(GroupSnapshot(tuple(reports), epoch, 1, 1, 0.0, last=epoch, leaving_since_s={B.shard_id: since_s}),
                  rules()).view
    assert view.has_ended(1) is goes and view.leaving == (B.shard_id,)


def test_what_only_it_holds_is_given_to_others_while_it_serves() -> None:
    epoch = epoch_of()
    view = decided(reports_of(epoch, leaving=(B,)), epoch)
    assert view.phase is GroupPhase.READY and view.leaving == (B.shard_id,) and view.ended_epoch_number == 0
    assert view.epoch is not None and view.epoch.placement == ONE_COPY
    change = running_change(view.epoch)
    assert change is not None and change.target is not None and change.target.shares == epoch.shares
    for had, wanted in zip(ONE_COPY.holders, change.target.placement.holders, strict=True):
        assert all(set(before) <= set(after) and set(after) - {1} for before, after in zip(had, wanted, strict=True))
    assert change.moved_bytes == 4 * 100            # 2 layers x 2 experts
    again = decided(reports_of(epoch, leaving=(B,)), view.epoch)
    assert again.epoch == view.epoch                # until the change is done
    moved = replace(view.epoch, placement=change.target.placement,
                    changes=(replace(change, state="done", target=None),))
    after = decided(reports_of(epoch, leaving=(B,)), moved).epoch
    assert after is not None and after.members == (A, C)


def test_what_cannot_be_moved_beside_what_runs_is_loaded_in_the_next_epoch() -> None:
    epoch = epoch_of()
    begun = decided(reports_of(epoch, leaving=(B,)), epoch).epoch
    assert begun is not None
    failed = replace(begun, changes=(replace(begun.changes[-1], state="failed", target=None),))
    after = decided(reports_of(epoch, leaving=(B,)), failed).epoch
    assert after is not None and after.members == (A, C)
    assert after.changes[-1].operation_id == leave_id(epoch, [B.shard_id])
    full = [replace(one, status=replace(one.status, resident_bytes=990)) for one in reports_of(epoch, leaving=(B,))]
    after = decided(full, epoch).epoch              # the caches give way
    assert after is not None and after.members == (A, C) and not after.changes


def test_it_stays_as_long_as_the_others_cannot_hold_the_model_and_it_is_said_why() -> None:
    small = tuple(member(name, budget=500) for name in "abc")
    epoch = epoch_of(members=small)
    view = decided(reports_of(epoch, leaving=small[1:2]), epoch)
    assert view.phase is GroupPhase.READY and view.epoch == epoch and view.leaving == (small[1].shard_id,)
    assert "cannot leave yet" in view.why and "bytes are missing" in view.why


def test_another_takes_its_place_before_it_goes_if_only_then_the_model_fits() -> None:
    small = tuple(member(name, budget=500) for name in "abc")
    epoch, other = epoch_of(members=small), member("d", budget=500)
    snapshot = GroupSnapshot((*reports_of(epoch, leaving=small[1:2]), report(other)), epoch, 1, 1, 0.0, last=epoch)
    assert decide(snapshot, rules()).to_plan == (*small, other)


@pytest.mark.parametrize(("budget", "remaining"), [(2000, 1), (800, 2)])
def test_of_several_as_many_leave_at_once_as_can_be_missed(budget: int, remaining: int) -> None:
    members = tuple(member(name, budget=budget) for name in "abc")
    epoch = epoch_of(TWO_COPIES, members)
    view = decided(reports_of(epoch, leaving=members[::2]), epoch)
    assert view.leaving == (A.shard_id, C.shard_id) and view.epoch is not None
    if remaining == 1:                              # experts 1 and 4 are on a and c only
        assert running_change(view.epoch) is not None
    else:
        assert view.epoch.members == members[1:]


def test_when_all_are_told_to_end_none_is_waited_for() -> None:
    epoch = epoch_of(TWO_COPIES)
    view = decided(reports_of(epoch, leaving=(A, B, C)), epoch)
    assert view.epoch == epoch and view.leaving == tuple(one.shard_id for one in (A, B, C))
    assert "all members are to end" in view.why


def test_who_leaves_is_not_taken_in_again() -> None:
    epoch = replace(epoch_of(Placement(2, (((0,), (0,), (0,), (1,), (1,), (1,)),) * 2), (A, C)), number=2)
    gone = _leaves(report(B, ShardState.WAITING, epoch_number=1))
    snapshot = GroupSnapshot((*reports_of(epoch), gone), epoch, 2, 2, 0.0, last=epoch)
    decision = decide(snapshot, rules())
    assert not decision.to_plan and decision.view.leaving == ()
    assert "0 of 1 shards are here" in decided([gone], None, num_members=1).why


@pytest.mark.parametrize(("budget", "num_left"), [(2000, 1), (800, 2)])
def test_when_another_dies_meanwhile_those_who_stay_go_on_without_both(budget: int, num_left: int) -> None:
    """One that leaves is kept where the model does not fit otherwise."""
    members = tuple(member(name, budget=budget) for name in "abc")
    epoch = epoch_of(TWO_COPIES, members)
    of_a, of_b, of_c = reports_of(epoch, leaving=members[1:2], state=ShardState.BROKEN)
    lost = [replace(one, status=replace(one.status, lost_peers=(C.shard_id,))) for one in (of_a, of_b)]
    dead = replace(of_c, status=replace(of_c.status, state=ShardState.READY))
    after = decided([*lost, dead], epoch).epoch
    assert after is not None and after.members == members[:num_left]
