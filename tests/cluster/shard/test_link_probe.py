"""The link between real processes."""

from __future__ import annotations

import math

import pytest

from model.step import StepHeader
from tests.process_pool import LONG_S, ProcessPool

pytestmark = pytest.mark.multinode


@pytest.mark.parametrize("num_members", [1, 2, 3])
def test_every_member_measures_its_link_and_the_group_goes_on(worker_pool: ProcessPool, num_members: int) -> None:
    worker_pool.run("tests.cluster.shard.group_jobs:join", [(worker_pool.meeting(num_members), LONG_S)] * num_members)
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
