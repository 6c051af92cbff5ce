"""Shards that compute different models are never in one group, and it is said why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.reports import Report
from cluster.coordinator.same_model import left_out
from cluster.coordinator.view import GroupPhase, ShardState
from serving.link.epoch import Member
from tests.cluster.coordinator.group_reports import member, report, rules, status_of
from tests.cluster.coordinator.test_membership import first_epoch

OLD, NEW = (f"checkpoint=11 revision=default dtype=bfloat16 code={code}" for code in ("aa", "bb"))
A, B, C = (replace(member(name), digest=OLD) for name in "abc")
D, E, F = (replace(member(name), digest=NEW) for name in "def")


def reports(*members: Member) -> list[Report]:
    return [report(one) for one in members]


def test_what_most_compute_counts_before_the_first_epoch() -> None:
    assert set(left_out(reports(D, A, B), None, -10.0)) == {D.shard_id}
    assert left_out(reports(A, B), None, -10.0) == {} == left_out([], None, -10.0)


def test_of_as_many_what_the_first_one_computes() -> None:
    late, early = replace(report(A), first_s=5.0), replace(report(D), first_s=1.0)
    assert set(left_out([late, early], None, -10.0)) == {A.shard_id}


def test_what_runs_counts_whoever_is_more_until_none_of_it_lives() -> None:
    epoch = replace(first_epoch(), members=(A, B, C))
    assert set(left_out(reports(A, D, E, F), epoch, -10.0)) == {D.shard_id, E.shard_id, F.shard_id}
    dead = report(A, ShardState.FAILED, 1)
    assert set(left_out([dead, *reports(D, E)], epoch, -10.0)) == {A.shard_id}
    silent = report(A, ShardState.READY, 1, at_s=-20.0)
    assert set(left_out([silent, *reports(D, E)], epoch, -10.0)) == {A.shard_id}


def test_an_epoch_that_is_yet_unknown_counts_more_than_newcomers() -> None:
    """The first reports after a coordinator's restart."""
    assert set(left_out([*reports(D, E), report(A, ShardState.READY, 4)], None, -10.0)) == {D.shard_id, E.shard_id}


def test_the_reason_names_what_differs() -> None:
    reason = left_out(reports(D, A, B), None, -10.0)[D.shard_id]
    assert "code=bb, the group's is aa" in reason and "dtype" not in reason


async def test_no_epoch_mixes_them_and_status_says_why() -> None:
    coordinator = Coordinator(rules(2), lambda: 100.0)
    for one in (A, D):
        await coordinator.report(one, status_of(one))
    status = await coordinator.status()
    assert status.view.phase is GroupPhase.WAITING and f"another model: {D.shard_id}" in status.view.why
    assert "1 of 2 shards are here" in status.view.why
    details = {one.shard_id: shard.detail for one, shard in status.shards}
    assert details[A.shard_id] == "" and "code=bb" in details[D.shard_id]
    await coordinator.report(B, status_of(B))
    view = await coordinator.watch("", 0.0)
    while view.epoch is None:
        view = await coordinator.watch(view.key, 60.0)
    assert view.epoch.members == (A, B)


@pytest.mark.parametrize("digest", ["", "checkpoint=11"])
def test_one_that_says_less_is_left_out_too(digest: str) -> None:
    short = replace(member("s"), digest=digest)
    assert set(left_out(reports(A, B, short), None, -10.0)) == {short.shard_id}
