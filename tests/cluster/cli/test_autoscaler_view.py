"""`moesaic status --autoscaler` says what is wanted, why, and what it waits for."""

from __future__ import annotations

from cluster.cli.autoscaler_view import autoscaler_view
from cluster.coordinator.view import AutoscalerStatus, ClusterStatus, GroupPhase, PoolSizeChange, View

VIEW = View(GroupPhase.READY, None)


def test_it_says_what_is_wanted_why_and_what_it_waits_for() -> None:
    changes = (PoolSizeChange("big", 1, 2, "first", 0.0), PoolSizeChange("big", 2, 3, "later", 60.0))
    scaling = AutoscalerStatus({"small": 1, "big": 3}, "decode", 0.5, "9 sequences decode", 0.25, "1 of pool big",
                               changes)
    text = autoscaler_view(ClusterStatus(VIEW, (), (), autoscaler=scaling)).splitlines()
    assert text[:4] == ["autoscaler: wants 3 of pool big, 1 of pool small", "backlog: 0.25 s",
                        "needed most: decode, 50% of what these can: 9 sequences decode", "waits for 1 of pool big"]
    assert [line.split(" ", 1)[1] for line in text[4:]] == ["pool big 2 -> 3: later", "pool big 1 -> 2: first"]


def test_without_one_it_says_how_to_have_one() -> None:
    assert "set `autoscaling` in the config" in autoscaler_view(ClusterStatus(VIEW, (), ()))
