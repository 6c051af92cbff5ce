"""With how many members a group starts."""

from __future__ import annotations

import pytest

from cluster.coordinator.group_size import (
    GroupSize,
    PoolSize,
    group_size,
    may_enter,
    may_start,
    who_is_missing,
)
from serving.config import parse_config
from serving.link.epoch import Member
from tests.cluster.coordinator.group_reports import member

ELASTIC = GroupSize({"gpu": PoolSize(1, 1, 1), "cpu": PoolSize(1, 3, 4)}, settle_s=30.0)
RIGID = GroupSize({"gpu": PoolSize(1, 1, 1), "cpu": PoolSize(3, 3, 3)}, settle_s=30.0)


def came(*names: str) -> list[Member]:
    """Shards of the pool before the name's dash."""
    return [member(name[4:], pool=name[:3]) for name in names]


@pytest.mark.parametrize(("size", "here", "quiet_s", "starts"), [
    (RIGID, ("gpu-a", "cpu-a", "cpu-b", "cpu-c"), 0.0, True),       # all are here: at once
    (RIGID, ("gpu-a", "cpu-a", "cpu-b"), 1e6, False),               # with fewer never
    (ELASTIC, ("gpu-a", "cpu-a", "cpu-b", "cpu-c"), 0.0, True),
    (ELASTIC, ("gpu-a", "cpu-a"), 29.0, False),                     # others may come yet
    (ELASTIC, ("gpu-a", "cpu-a"), 30.0, True),
    (ELASTIC, ("cpu-a", "cpu-b", "cpu-c"), 1e6, False),             # none of a pool that must be there
    (ELASTIC, (), 1e6, False),
])
def test_a_group_starts_with_all_or_with_those_who_are_here_when_nobody_comes_any_more(
        size: GroupSize, here: tuple[str, ...], quiet_s: float, starts: bool) -> None:
    assert may_start(came(*here), size, quiet_s) == starts


def test_it_says_what_it_waits_for() -> None:
    assert who_is_missing(came("cpu-a"), RIGID) == "1 of 4 shards are here (node-a)"
    assert who_is_missing(came("cpu-a"), ELASTIC).endswith("(node-a); it takes at least 1 of pool gpu")
    assert who_is_missing(came("gpu-a", "cpu-a"), ELASTIC).endswith("when no other comes within 30 s")


def test_sizes_come_from_the_config_and_are_rigid_unless_said() -> None:
    config = parse_config({"model": {"path": "tiny"}, "pools": [
        {"name": "a", "replicas": 3}, {"name": "b", "replicas": 2, "min_replicas": 1}]})
    size = group_size(config)
    assert size == GroupSize({"a": PoolSize(3, 3, 3), "b": PoolSize(1, 2, 2)}, 30.0)
    assert size.is_elastic and size.num_members == 5
    rigid = group_size(parse_config({"model": {"path": "tiny"}, "pools": [{"name": "a", "replicas": 3}]}))
    assert not rigid.is_elastic


def test_a_pool_that_is_to_have_more_takes_more_in_and_one_that_is_to_have_fewer_no_other() -> None:
    gpu, *cpus = came("gpu-a", "cpu-a", "cpu-b", "cpu-c", "cpu-d")
    assert may_enter(cpus, [gpu], ELASTIC) == cpus[:3]
    assert may_enter(cpus, [gpu], ELASTIC.with_wanted("cpu", 4)) == cpus
    assert may_enter(cpus[2:], [gpu, *cpus[:2]], ELASTIC.with_wanted("cpu", 2)) == []
    assert ELASTIC.with_wanted("cpu", 4).num_members == 5


def test_a_group_of_a_fixed_number_has_no_more_whatever_the_pools_have() -> None:
    size = GroupSize({"cpu": PoolSize(4, 4, 4)}, 30.0, fixed_members=2)
    comers = came("cpu-a", "cpu-b", "cpu-c")
    assert may_enter(comers, [], size) == comers[:2] and may_enter(comers[2:], comers[:2], size) == []
