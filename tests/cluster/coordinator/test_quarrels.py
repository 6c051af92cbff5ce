"""Members that live and do not hear each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.coordinator.membership import GroupSnapshot, decide
from cluster.coordinator.planning import plan_members
from cluster.coordinator.quarrels import (
    FIRST_DELAY_S,
    FORGET_AFTER_S,
    Pair,
    Quarrel,
    kept_apart,
    kept_out,
    noted,
    ways_apart,
)
from cluster.coordinator.reports import Report
from cluster.coordinator.view import ShardState
from serving.link.epoch import Epoch, Member
from tests.cluster.coordinator.any_order import AnyOrder
from tests.cluster.coordinator.group_reports import member, report, rules

A, B, C, D = (member(name, budget=2000) for name in "abcd")
A_B = frozenset({A.shard_id, B.shard_id})


def epoch_of(*members: Member) -> Epoch:
    planned = plan_members(members, rules(len(members)), None).placement
    assert planned is not None
    return Epoch(1, members, planned.placement, "", planned.shares)


FIRST = epoch_of(A, B, C)


def broken(one: Member, *lost: Member, epoch_number: int = 1, num_running: int = 0) -> Report:
    said = report(one, ShardState.BROKEN, epoch_number)
    return replace(said, status=replace(said.status, lost_peers=tuple(peer.shard_id for peer in lost),
                                        num_running=num_running))


def test_two_are_kept_apart_when_they_break_a_second_epoch_and_longer_each_time() -> None:
    quarrels: tuple[Quarrel, ...] = ()
    delays_s = []
    for number in range(1, 6):
        epoch, now_s = replace(FIRST, number=number), 100.0 * number
        reports = [broken(A, B, epoch_number=number), broken(B, epoch_number=number), broken(C, epoch_number=number)]
        for _ in range(2):              # the same reports again are the same quarrel
            quarrels = noted(quarrels, epoch, reports, now_s)
        heard = [broken(one, epoch_number=number) for one in (A, B, C)]
        assert kept_apart(quarrels, heard, now_s) == (frozenset({A_B}) if number > 1 else frozenset())
        delays_s.append(quarrels[0].until_s - now_s)
    assert delays_s == [0.0, *(FIRST_DELAY_S * 2 ** num for num in range(4))]


def test_two_are_together_again_when_they_hear_each_other_and_some_time_has_passed() -> None:
    quarrels = (Quarrel(A_B, 2, 100.0, 2),)
    later_s = 100.0 + FIRST_DELAY_S
    deaf, hears = [broken(B, A, epoch_number=2)], [broken(B, epoch_number=2)]
    assert kept_apart(quarrels, hears, later_s - 1.0) == {A_B} and kept_apart(quarrels, hears, later_s) == frozenset()
    assert kept_apart(quarrels, deaf, later_s + 1e6) == {A_B}
    assert noted(quarrels, FIRST, deaf, later_s + 1e6) == quarrels
    assert noted(quarrels, FIRST, hears, later_s + FORGET_AFTER_S) == quarrels
    assert noted(quarrels, FIRST, hears, later_s + FORGET_AFTER_S + 1.0) == ()


def test_who_dies_quarrels_with_nobody() -> None:
    for of_b in ([], [report(B, ShardState.READY, 1)], [report(B, ShardState.FAILED, 1)]):
        reports = [broken(A, B), broken(C, B), *of_b]
        assert noted((), FIRST, reports, 0.0) == () and kept_out((), epoch_of(A, C), reports, 0.0) == {}


def test_who_quarrels_with_many_is_kept_out_else_who_is_missed_least() -> None:
    pairs = {frozenset({A.shard_id, one.shard_id}) for one in (B, C)}
    assert ways_apart(pairs, [broken(one) for one in (A, B, C)])[0] == {A.shard_id}
    assert ways_apart({A_B}, [broken(A), broken(B, num_running=1)])[0] == {A.shard_id}
    assert ways_apart({A_B}, [broken(A, num_running=1), broken(B)])[0] == {B.shard_id}
    assert ways_apart({A_B}, [broken(A), broken(C)]) == [frozenset()]


names = st.sampled_from("abcdef")


@given(st.frozensets(st.frozensets(names, min_size=2, max_size=2)))
def test_every_way_leaves_only_members_who_hear_each_other_and_one_leaves_the_most(pairs: frozenset[Pair]) -> None:
    present = [replace(report(member(name)), member=replace(member(name), shard_id=name)) for name in "abcdef"]
    ways = ways_apart(pairs, present)
    assert all(pair & out for pair in pairs for out in ways)
    alone = [chosen for chosen in _subsets("abcdef") if not any(pair <= chosen for pair in pairs)]
    assert len(ways[0]) == 6 - max(map(len, alone))
    largest = {chosen for chosen in alone if not any(chosen < other for other in alone)}
    assert largest <= {frozenset("abcdef") - out for out in ways}      # whoever can hold the model is among them


def _subsets(letters: str) -> list[frozenset[str]]:
    return [frozenset(letter for bit, letter in enumerate(letters) if number >> bit & 1)
            for number in range(1 << len(letters))]


def test_the_group_goes_on_without_one_of_two_that_quarrel_again_and_says_why() -> None:
    reports = (broken(A, B), broken(B, A), broken(C))
    snapshot = GroupSnapshot(reports, FIRST, 1, 1, 0.0, quarrels=(Quarrel(A_B, 1, 0.0),))
    again = decide(snapshot, rules()).view.epoch
    assert again is not None and again.members == (A, B, C)
    view = decide(replace(snapshot, quarrels=(Quarrel(A_B, 1, 0.0, 2),)), rules()).view
    assert view.epoch is not None and view.epoch.members == (A, C)
    assert f"without {B.shard_id}, which others do not hear" in view.why
    why = kept_out(snapshot.quarrels, view.epoch, reports, 0.0)
    assert list(why) == [B.shard_id] and f"it and {A.shard_id} live" in why[B.shard_id]


def test_the_one_is_kept_without_whom_the_model_cannot_be_held() -> None:
    small = replace(B, facts=replace(B.facts, memory_budget_bytes=400))
    reports = (broken(A, small), broken(small, A, num_running=9))
    snapshot = GroupSnapshot(reports, epoch_of(A, small), 1, 1, 0.0, quarrels=(Quarrel(A_B, 1, 0.0, 2),))
    epoch = decide(snapshot, rules()).view.epoch
    assert epoch is not None and epoch.members == (A,)


def test_who_does_not_hear_a_member_is_not_taken_in() -> None:
    running = [report(one, ShardState.READY, 1) for one in (A, B)]
    deaf = replace(broken(C, A, epoch_number=0), status=replace(broken(C, A).status, state=ShardState.WAITING))
    snapshot = GroupSnapshot((*running, deaf), epoch_of(A, B), 1, 1, 0.0)
    assert decide(snapshot, rules()).to_plan == ()
    hears = replace(deaf, status=replace(deaf.status, lost_peers=()))
    assert decide(replace(snapshot, reports=(*running, hears)), rules()).to_plan == (A, B, C)


@pytest.mark.parametrize("cuts", [["01"], ["01", "02", "03"], ["01", "12", "23", "30"], ["02", "03", "12", "13"],
                                  ["01", "02", "03", "12", "13", "23"]])
def test_whatever_cuts_last_a_group_of_those_who_hear_each_other_serves_in_the_end(cuts: list[str]) -> None:
    nodes = AnyOrder()
    nodes.cuts = {frozenset(map(int, cut)) for cut in cuts}
    nodes.teardown()


def test_a_group_starts_with_those_who_hear_each_other() -> None:
    said = [report(one) for one in (A, B, C)]
    deaf = replace(report(D), status=replace(report(D).status, lost_peers=(A.shard_id,)))
    assert decide(GroupSnapshot((*said, deaf), None, 0, 0, 0.0), rules()).to_plan == (A, B, C)
    pairs = (Quarrel(A_B, 1, 0.0, 2),)
    assert decide(GroupSnapshot((*said, report(D)), None, 0, 0, 0.0, quarrels=pairs), rules()).to_plan == (A, C, D)
