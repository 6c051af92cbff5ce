"""A service sleeps from the moment that no shard is wanted until the group runs again, and says so."""

from __future__ import annotations

from cluster.coordinator.group_size import GroupSize, PoolSize
from cluster.coordinator.sleep import asleep_since, with_sleep
from cluster.coordinator.view import GroupPhase, View

AWAKE = GroupSize({"cpu": PoolSize(1, 2, 4), "gpu": PoolSize(1, 1, 1)}, 30.0)
ASLEEP = AWAKE.with_wanted("cpu", 0).with_wanted("gpu", 0)
WAITING = View(GroupPhase.WAITING, None, "0 of 3 shards are here")


def test_it_sleeps_until_the_group_runs_again() -> None:
    assert AWAKE.with_wanted("cpu", 0).is_asleep is False
    assert asleep_since(None, AWAKE, GroupPhase.WAITING, 5.0) is None
    assert asleep_since(None, ASLEEP, GroupPhase.WAITING, 6.0) == 6.0
    assert asleep_since(6.0, ASLEEP, GroupPhase.WAITING, 9.0) == 6.0
    assert asleep_since(6.0, AWAKE, GroupPhase.LOADING, 12.0) == 6.0
    assert asleep_since(6.0, AWAKE, GroupPhase.READY, 15.0) is None


def test_the_view_says_since_when_and_what_wakes_it() -> None:
    assert with_sleep(WAITING, None, AWAKE) == WAITING
    asleep, waking = with_sleep(WAITING, 0.0, ASLEEP), with_sleep(WAITING, 0.0, AWAKE)
    assert asleep.is_asleep and asleep.why == "asleep since 1970-01-01 00:00:00 UTC, wakes on the first request"
    assert waking.is_asleep
    assert waking.why == "wakes up, was asleep since 1970-01-01 00:00:00 UTC; 0 of 3 shards are here"
    assert len({view.key for view in (WAITING, asleep, waking)}) == 3       # so everybody hears of it
