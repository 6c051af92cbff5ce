"""A faster placement is looked for in time, and taken when it is worth it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator.rebalance import epoch_to_rebalance, gain_worth_taking, rebalance_id
from cluster.coordinator.view import GroupPhase, View
from cluster.planner.plan_rules import BestChange
from model.placement import Placement
from serving.config import PlacementConfig
from serving.link.epoch import Epoch, PlacementChange, PlanFigures, PlannedPlacement, RequestShare
from tests.cluster.coordinator.group_reports import member

CONFIG = PlacementConfig(rebalance_margin=0.1)
FIGURES = PlanFigures(64, 100, 0.5, 0.4, "compute", "exact")
SHARES = (RequestShare(1.0, 64),)
EPOCH = Epoch(3, (member("a"),), Placement(1, (((0,),),)), "", SHARES, FIGURES, revision=2)
VIEW = View(GroupPhase.READY, EPOCH)


def change(operation_id: str, state: str) -> PlacementChange:
    return PlacementChange(operation_id, "why", 0, 0, 1, state)     # type: ignore[arg-type]


def test_a_ready_group_with_new_rows_is_looked_at() -> None:
    assert epoch_to_rebalance(VIEW, CONFIG, 10.0, 9.0) is EPOCH


@pytest.mark.parametrize(("view", "config", "num_rows"), [
    (VIEW, CONFIG, 9.0),                                                            # nothing new was counted
    (View(GroupPhase.WAITING, None), CONFIG, 10.0),
    (replace(VIEW, phase=GroupPhase.JOINING), CONFIG, 10.0),
    (VIEW, PlacementConfig(rebalance_margin=None), 10.0),
    (VIEW, PlacementConfig(rebalance_margin=0.1, policy="even"), 10.0),
    (replace(VIEW, epoch=replace(EPOCH, figures=replace(FIGURES, solver="given"))), CONFIG, 10.0),
    (replace(VIEW, epoch=replace(EPOCH, changes=(change("other", "running"),))), CONFIG, 10.0),
    (replace(VIEW, epoch=replace(EPOCH, changes=(change(rebalance_id(EPOCH), "failed"),))), CONFIG, 10.0),
])
def test_all_else_is_left_alone(view: View, config: PlacementConfig, num_rows: float) -> None:
    assert epoch_to_rebalance(view, config, num_rows, 9.0) is None


@pytest.mark.parametrize(("running_s", "gain"), [(0.6, pytest.approx(0.2)), (0.54, None), (0.4, None)])
def test_a_gain_below_the_margin_is_not_taken(running_s: float, gain: float | None) -> None:
    assert gain_worth_taking(BestChange(running_s, PlannedPlacement(EPOCH.placement, SHARES, FIGURES)), 0.1) == gain
