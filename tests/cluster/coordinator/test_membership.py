"""The group's decisions, one snapshot at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator.group_size import GroupSize, PoolSize
from cluster.coordinator.membership import GroupSnapshot, decide
from cluster.coordinator.planning import plan_members
from cluster.coordinator.reports import Report
from cluster.coordinator.view import GroupPhase, ShardState, View
from serving.link.epoch import Epoch
from tests.cluster.coordinator.group_reports import member, report, rules

A, B, C, D = (member(name) for name in "abcd")


def decided(reports: list[Report], epoch: Epoch | None = None, highest: int = 0, now_s: float = 0.0,
            num_members: int = 3) -> View:
    """With a placement, should one be needed: the coordinator makes it beside its work."""
    snapshot = GroupSnapshot(tuple(reports), epoch, highest, highest, now_s)
    decision = decide(snapshot, rules(num_members))
    if not decision.to_plan:
        return decision.view
    assert decision.view.epoch is None and "is planned" in decision.view.why
    planned = plan_members(decision.to_plan, rules(num_members), epoch)
    return decide(replace(snapshot, planned=planned), rules(num_members)).view


def first_epoch() -> Epoch:
    epoch = decided([report(one) for one in (A, B, C)]).epoch
    assert epoch is not None
    return epoch


def test_waits_for_all_members_and_says_who_is_here() -> None:
    view = decided([report(B), report(A)])
    assert (view.phase, view.epoch) == (GroupPhase.WAITING, None)
    assert view.why == "2 of 3 shards are here (node-a, node-b)"


def test_epoch_one_orders_ranks_by_pool_and_node_however_they_report() -> None:
    fast = member("z", pool="gpu")
    for reports in ([report(one) for one in (B, fast, A)], [report(one) for one in (A, B, fast)]):
        epoch = decided(reports).epoch
        assert epoch is not None and epoch.number == 1
        assert epoch.members == (fast, A, B)


def test_spare_members_stay_out() -> None:
    epoch = decided([report(one) for one in (A, B, C, D)]).epoch
    assert epoch is not None and epoch.rank_of(D.shard_id) is None


def test_members_that_cannot_hold_the_model_learn_what_is_missing_where() -> None:
    small = [report(member(name, budget=400)) for name in "abc"]
    view = decided(small)
    assert view.is_too_small and view.epoch is None
    # 400 - 10 process - 20 buffers (- 80 with requests) = 370 (290) for experts: 3, 3 and 2 of the 12, 4 are missing.
    assert "600 bytes are missing" in view.why
    assert all(f"member node-{name}: 200 bytes missing (budget 400 - process 10" in view.why for name in "abc")


def test_phases_follow_the_slowest_member() -> None:
    epoch = first_epoch()
    for states, phase in [
            ((ShardState.WAITING,) * 3, GroupPhase.LOADING),
            ((ShardState.LOADED, ShardState.LOADING, ShardState.LOADED), GroupPhase.LOADING),
            ((ShardState.LOADED, ShardState.JOINING, ShardState.LOADED), GroupPhase.JOINING),
            ((ShardState.READY, ShardState.READY, ShardState.JOINING), GroupPhase.JOINING),
            ((ShardState.READY,) * 3, GroupPhase.READY)]:
        reports = [report(one, state, epoch_number=0 if state is ShardState.WAITING else 1)
                   for one, state in zip((A, B, C), states, strict=True)]
        view = decided(reports, epoch, highest=1)
        assert view.phase is phase and view.epoch is not None and view.epoch.number == 1


def test_members_meet_where_rank_0_says_when_all_have_loaded() -> None:
    epoch, moved = first_epoch(), replace(A, store_address="a:77")
    view = decided([report(one, ShardState.LOADED, epoch_number=1) for one in (moved, B, C)], epoch, highest=1)
    assert view.epoch == replace(epoch, rendezvous="tcp://a:77")
    again = decided([report(one, ShardState.JOINING, epoch_number=1) for one in (A, B, C)], view.epoch, highest=1)
    assert again.epoch == view.epoch


@pytest.mark.parametrize(("of_c", "reason"), [
    (report(C, ShardState.READY, epoch_number=1, at_s=-20.0), "is gone"),
    (report(C, ShardState.FAILED, epoch_number=1, detail="bad weights"), "bad weights"),
    (report(C, ShardState.WAITING, epoch_number=1, detail="group broke"), "left it: group broke")])
def test_a_member_that_is_gone_ends_the_epoch(of_c: Report, reason: str) -> None:
    of_others = [report(one, ShardState.READY, epoch_number=1) for one in (A, B)]
    view = decided([*of_others, of_c], first_epoch(), highest=1)
    assert view.epoch is None and reason in view.why and view.has_ended(1) and not view.has_ended(2)
    assert "have left: shard cpu-a" in view.why


@pytest.mark.parametrize("of_c", [report(C, ShardState.READY, epoch_number=1), report(C, ShardState.FAILED, 1), None])
def test_who_is_left_goes_on_at_once(of_c: Report | None) -> None:
    """Whose connection has ended is gone, though it was heard of a moment ago."""
    epoch = first_epoch()
    broken = report(A, ShardState.BROKEN, epoch_number=1)
    broken = replace(broken, status=replace(broken.status, lost_peers=(C.shard_id,)))
    reports = [broken, report(B, ShardState.BROKEN, epoch_number=1), *([of_c] if of_c else [])]
    view = decided(reports, epoch, highest=1)
    assert view.phase is GroupPhase.LOADING and view.has_ended(1) and view.epoch is not None
    assert (view.epoch.number, view.epoch.members) == (2, (A, B))
    assert sum(share.fraction for share in view.epoch.shares) == pytest.approx(1)


def test_a_broken_connection_between_two_that_live_costs_no_member() -> None:
    one, other = (replace(some, status=replace(some.status, lost_peers=(peer.shard_id,))) for some, peer in (
        (report(A, ShardState.BROKEN, epoch_number=1), B), (report(B, ShardState.BROKEN, epoch_number=1), A)))
    view = decided([one, other, report(C, ShardState.BROKEN, epoch_number=1)], first_epoch(), highest=1)
    assert view.epoch is not None and view.epoch.members == (A, B, C)


def test_two_that_die_at_once_and_one_that_dies_while_the_next_epoch_loads() -> None:
    a, b, c = (member(name, budget=2000) for name in "abc")
    epoch = decided([report(one) for one in (a, b, c)]).epoch
    assert epoch is not None
    broken = report(a, ShardState.BROKEN, epoch_number=1)
    alone = replace(broken, status=replace(broken.status, lost_peers=(b.shard_id, c.shard_id)))
    view = decided([alone, *(report(one, ShardState.READY, epoch_number=1) for one in (b, c))], epoch, highest=1)
    assert view.epoch is not None and view.epoch.members == (a,)
    two = decided([broken, report(b, ShardState.BROKEN, epoch_number=1), report(c, ShardState.FAILED, 1)], epoch,
                  highest=1).epoch
    assert two is not None and two.members == (a, b)
    dead = report(b, ShardState.FAILED, epoch_number=2)
    view = decided([report(a, ShardState.LOADED, epoch_number=2), dead], two, highest=2)
    assert view.epoch is None and view.has_ended(2)                         # a is told to leave it
    view = decided([report(a, ShardState.BROKEN, epoch_number=2), dead], two, highest=2)
    assert view.epoch is not None and (view.epoch.number, view.epoch.members) == (3, (a,))


def test_those_that_are_left_and_cannot_hold_the_model_wait_and_say_what_is_missing() -> None:
    small = [member(name, budget=700) for name in "abc"]
    epoch = decided([report(one) for one in small]).epoch
    assert epoch is not None
    broken = report(small[0], ShardState.BROKEN, epoch_number=1)
    broken = replace(broken, status=replace(broken.status, lost_peers=tuple(one.shard_id for one in small[1:])))
    view = decided([broken], epoch, highest=1)
    assert view.epoch is None and "cannot hold the model" in view.why and "bytes are missing" in view.why
    assert "1 of 3 shards are here" in view.why


def test_the_next_epoch_waits_until_everybody_has_left_the_last() -> None:
    """One that says that it still serves may be dead: an epoch with it would end at once."""
    left = [report(one, ShardState.WAITING, epoch_number=1, detail="group broke") for one in (A, B)]
    view = decided([*left, report(C, ShardState.READY, epoch_number=1)], first_epoch(), highest=1)
    assert view.epoch is None and "have left: shard cpu-c on node node-c (epoch 1)" in view.why
    view = decided([*left, report(C, ShardState.WAITING, epoch_number=1)], first_epoch(), highest=1)
    assert view.epoch is not None and view.epoch.number == 2
    gone = report(C, ShardState.READY, epoch_number=1, at_s=-20.0)
    view = decided([*left, gone, report(D)], first_epoch(), highest=1)
    assert view.epoch is not None and view.epoch.members == (A, B)          # D may join it
    view = decided([*left, gone, report(D)], highest=1)                     # nobody knows of the last epoch
    assert view.epoch is not None and view.epoch.members == (A, B, D)


@pytest.mark.parametrize(("last_heard_s", "started_s", "node_id", "is_gone"), [
    (-7.0, -1.0, C.node_id, True),
    (-5.0, -1.0, C.node_id, False),         # it may be about to repeat itself
    (-7.0, -8.0, C.node_id, False),         # heard of since the other one began
    (-7.0, -1.0, "elsewhere", False)])
def test_a_silent_member_is_gone_sooner_when_its_place_is_taken(last_heard_s: float, started_s: float, node_id: str,
                                                                is_gone: bool) -> None:
    serving = [report(one, ShardState.READY, epoch_number=1) for one in (A, B)]
    silent = replace(report(C, ShardState.READY, epoch_number=1, at_s=last_heard_s), first_s=-60.0)
    other = replace(report(replace(D, node_id=node_id)), first_s=started_s)
    view = decided([*serving, silent, other], first_epoch(), highest=1)
    assert view.has_ended(1) is is_gone


def test_the_next_epoch_is_numbered_above_all_seen() -> None:
    reports = [report(A, ShardState.WAITING, epoch_number=7), report(B, ShardState.WAITING, epoch_number=7), report(D)]
    epoch = decided(reports, first_epoch(), highest=7).epoch
    assert epoch is not None and epoch.number == 8 and epoch.members == (A, B)


def test_nothing_is_planned_over_an_epoch_that_runs_unknown() -> None:
    reports = tuple(report(one, ShardState.READY, epoch_number=4) for one in (A, B, C))
    view = decide(GroupSnapshot(reports, None, highest_epoch_number=4, known_epoch_number=3, now_s=0.0),
                  rules()).view
    assert view.epoch is None and "epoch 4 runs" in view.why


def test_views_are_told_apart_by_their_keys() -> None:
    views = [decided([report(A)]), decided([report(A), report(B)]), decided([report(one) for one in (A, B, C)])]
    assert len({view.key for view in views}) == 3


def test_views_of_one_epoch_are_told_apart_by_what_runs_and_what_comes() -> None:
    epoch = first_epoch()
    later = replace(epoch, revision=1)
    views = [View(GroupPhase.READY, epoch), View(GroupPhase.READY, epoch, next=later),
             View(GroupPhase.READY, epoch, next=replace(epoch, revision=2)), View(GroupPhase.READY, later)]
    assert len({view.key for view in views}) == 4


def test_a_plan_of_other_members_is_not_used() -> None:
    planned = plan_members((A, B, C), rules(), None)
    snapshot = GroupSnapshot(tuple(report(one) for one in (A, B, D)), None, 0, 0, 0.0, planned)
    assert decide(snapshot, rules()).to_plan == (A, B, D)


def test_a_group_that_may_be_smaller_starts_with_those_who_are_here_when_nobody_comes_any_more() -> None:
    elastic = replace(rules(), size=GroupSize({"gpu": PoolSize(0, 0, 0), "cpu": PoolSize(1, 3, 3)}, settle_s=30.0))
    here = GroupSnapshot((report(A, at_s=34.0), replace(report(B, at_s=34.0), first_s=5.0)), None, 0, 0, now_s=34.0)
    first = decide(here, elastic)
    assert not first.to_plan and first.view.why.endswith("(node-a, node-b); starts with these when no other comes "
                                                         "within 30 s")
    reports = tuple(replace(one, at_s=35.0) for one in here.reports)
    later = replace(here, reports=reports, now_s=35.0)
    assert decide(later, elastic).to_plan == (A, B)
    planned = plan_members((A, B), elastic, None)
    epoch = decide(replace(later, planned=planned), elastic).view.epoch
    assert epoch is not None and epoch.members == (A, B)


def test_a_smaller_group_that_cannot_hold_the_model_waits_for_more() -> None:
    elastic = replace(rules(), size=GroupSize({"gpu": PoolSize(0, 0, 0), "cpu": PoolSize(1, 3, 3)}, settle_s=0.0))
    small = member("s", budget=400)
    view = decide(GroupSnapshot((report(small),), None, 0, 0, 0.0, plan_members((small,), elastic, None)), elastic).view
    assert view.epoch is None and "bytes are missing" in view.why and not view.is_too_small
