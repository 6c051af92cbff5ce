"""The link between real processes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.shard.epoch_run import known_link
from model.step import StepHeader
from serving.link.epoch import DeviceFacts, Link, Member
from tests.cluster.profiles import PROFILE
from tests.deadlines import PATIENCE_S
from tests.process_pool import ProcessPool

pytestmark = pytest.mark.multinode


@pytest.mark.parametrize("num_members", [1, 2, 3])
def test_every_member_measures_its_link_and_the_group_goes_on(worker_pool: ProcessPool, num_members: int) -> None:
    meeting = worker_pool.meeting(num_members)
    worker_pool.run("tests.cluster.shard.group_jobs:join", [(meeting, PATIENCE_S)] * num_members)
    links = worker_pool.run("tests.cluster.shard.link_jobs:measure", [()] * num_members)
    if num_members == 1:
        assert links == [None]
        return
    for link in links:
        assert 0 < link.latency_s < math.inf and 0 < link.bytes_per_s < math.inf
    headers = tuple(StepHeader(1, 0, rank) for rank in range(num_members))
    agreed = worker_pool.run("tests.cluster.shard.group_jobs:agree", [(header,) for header in headers])
    assert agreed == [headers] * num_members
    worker_pool.run("tests.cluster.shard.group_jobs:leave", [()] * num_members)


def test_who_joins_others_that_have_measured_measures_nothing() -> None:
    """All members come to the same: to measure or not."""
    near, far = Link(1e-5, 4e9), Link(2e-4, 1e9)
    facts = DeviceFacts("cpu", "test", "test", 1, 1)
    members = [Member(str(rank), "p", "n", "n", "n:1", facts, profile=replace(PROFILE, link=link))
               for rank, link in enumerate((near, far, None))]
    assert [known_link(members, rank) for rank in range(3)] == [near, far, far]
    assert [known_link(members[2:] * 2, rank) for rank in range(2)] == [None, None]
