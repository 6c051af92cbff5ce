from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.coordinator.work_reports import MIN_ROWS_PER_EXPERT, WorkReports
from serving.engine.expert_load import ExpertLoad
from serving.link.epoch import Epoch, Link, WorkRatio
from tests.cluster.coordinator.group_reports import member
from tests.placements import contiguous_placement, even_shares

A, B, GONE = (member(name) for name in ("a", "b", "gone"))
EPOCH = Epoch(1, (A, B), contiguous_placement(2, 6, (3, 3)), "", even_shares(2))


def load_of(rows: float, num_layers: int = 2) -> ExpertLoad:
    return ExpertLoad(num_layers, 6, np.full((num_layers, 6), rows, dtype=np.float32).tobytes())


@pytest.fixture
def work() -> WorkReports:
    return WorkReports(2, 6)


def test_rows_of_the_epochs_members_are_added_up(work: WorkReports) -> None:
    for one, rows in ((A, 3.0), (B, 4.0), (GONE, 100.0)):
        work.add(one.shard_id, load_of(rows), None)
    assert work.load(EPOCH).rows().tolist() == [[7.0] * 6] * 2
    assert work.load(None).rows().tolist() == [[0.0] * 6] * 2
    work.add(B.shard_id, load_of(100.0, num_layers=3), None)     # of another model
    assert work.load(EPOCH).rows().tolist() == [[3.0] * 6] * 2


def test_too_few_rows_say_nothing(work: WorkReports) -> None:
    work.add(A.shard_id, load_of(MIN_ROWS_PER_EXPERT - 1), None)
    assert work.counted(EPOCH) is None
    work.add(B.shard_id, load_of(1.0), None)
    counted = work.counted(EPOCH)
    assert counted is not None and counted.tolist() == [[MIN_ROWS_PER_EXPERT] * 6] * 2


def test_profiles_are_those_reported_last_times_the_ratios(work: WorkReports) -> None:
    assert A.profile is not None
    work.add(A.shard_id, load_of(1.0), WorkRatio(own=None, experts=2.0, num_steps=50))
    linked = replace(A, profile=replace(A.profile, link=Link(1e-3, 1e9)))
    measured = work.as_measured(EPOCH, {A.shard_id: linked})
    profile = measured.members[0].profile
    assert profile is not None and profile.link == Link(1e-3, 1e9) and profile.dense_s == A.profile.dense_s
    assert [seconds for _, seconds in profile.expert_s] == [2 * seconds for _, seconds in A.profile.expert_s]
    assert measured.members[1] == B and replace(measured, members=EPOCH.members) == EPOCH


def test_who_is_forgotten_counts_no_more(work: WorkReports) -> None:
    for one in (A, B):
        work.add(one.shard_id, load_of(5.0), WorkRatio(1.0, 1.0, 20))
    work.forget_others({A.shard_id})
    assert work.ratios(EPOCH) == (WorkRatio(1.0, 1.0, 20), None)
    assert work.load(EPOCH).rows().max() == 5.0
