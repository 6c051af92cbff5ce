"""The coordinator asks the planner, and this is what it makes of the answers."""

from __future__ import annotations

from dataclasses import replace

from cluster.coordinator.planning import plan_members
from serving.link.epoch import PlacementChange
from tests.cluster.coordinator.group_reports import member, rules
from tests.cluster.coordinator.test_membership import B, C, D, first_epoch


def test_members_of_the_epoch_before_keep_what_they_held_and_its_changes_are_remembered() -> None:
    before = first_epoch()
    before = replace(before, changes=(PlacementChange("op", "because", 100, 0, 1),))
    planned = plan_members((B, C, D), rules(), before)
    assert planned.placement is not None
    placement = planned.placement.placement
    for layer in range(2):
        for old_rank, new_rank in ((1, 0), (2, 1)):      # B and C; D holds what A held
            assert set(before.placement.experts_of(layer, old_rank)) <= set(placement.experts_of(layer, new_rank))
    assert [(change.operation_id, change.state) for change in planned.changes] == [("op", "failed")]


def test_members_that_cannot_hold_the_model_get_the_reason() -> None:
    planned = plan_members((member("small", budget=150),), rules(1), None)
    assert planned.placement is None and planned.shard_ids == ("cpu-small",)
    assert "bytes are missing" in planned.why
