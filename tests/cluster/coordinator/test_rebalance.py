"""A faster placement is looked for in time, and taken when it is worth it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.coordinator.rebalance import epoch_to_rebalance, rebalance_id, why_worth_taking
from cluster.coordinator.view import GroupPhase, View
from cluster.planner.plan_rules import BestChange, PlanRules
from model.placement import Placement
from serving.config import PlacementConfig
from serving.link.epoch import Epoch, PlacementChange, PlanFigures, PlannedPlacement, RequestShare
from tests.cluster.coordinator.group_reports import member, rules

CONFIG = PlacementConfig(rebalance_margin=0.1)
FIGURES = PlanFigures(64, 100, 0.5, 0.4, "compute", "exact")
SHARES = (RequestShare(1.0, 64),)
EPOCH = Epoch(3, (member("a"),), Placement(1, (((0,),),)), "", SHARES, FIGURES, revision=2)
VIEW = View(GroupPhase.READY, EPOCH)


def plan(config: PlacementConfig) -> PlanRules:
    return rules(config=config).plan


def change(operation_id: str, state: str) -> PlacementChange:
    return PlacementChange(operation_id, "why", 0, 0, 1, state)     # type: ignore[arg-type]


def test_a_ready_group_with_new_rows_is_looked_at() -> None:
    assert epoch_to_rebalance(VIEW, plan(CONFIG), 10.0, 9.0) is EPOCH


@pytest.mark.parametrize(("view", "config", "num_rows"), [
    (VIEW, CONFIG, 9.0),                                                            # nothing new was counted
    (View(GroupPhase.WAITING, None), CONFIG, 10.0),
    (replace(VIEW, phase=GroupPhase.JOINING), CONFIG, 10.0),
    (replace(VIEW, leaving=("cpu-a",)), CONFIG, 10.0),
    (VIEW, PlacementConfig(rebalance_margin=None), 10.0),
    (VIEW, PlacementConfig(rebalance_margin=0.1, policy="even"), 10.0),
    (replace(VIEW, epoch=replace(EPOCH, figures=replace(FIGURES, solver="given"))), CONFIG, 10.0),
    (replace(VIEW, epoch=replace(EPOCH, changes=(change("other", "running"),))), CONFIG, 10.0),
    (replace(VIEW, epoch=replace(EPOCH, changes=(change(rebalance_id(EPOCH), "failed"),))), CONFIG, 10.0),
])
def test_all_else_is_left_alone(view: View, config: PlacementConfig, num_rows: float) -> None:
    assert epoch_to_rebalance(view, plan(config), num_rows, 9.0) is None


@pytest.mark.parametrize(("running_s", "why"), [(0.6, "20% faster"), (0.54, None), (0.4, None)])
def test_a_gain_below_the_margin_is_not_taken(running_s: float, why: str | None) -> None:
    assert why_worth_taking(BestChange(running_s, PlannedPlacement(EPOCH.placement, SHARES, FIGURES)), 0.1) == why


def test_lost_copies_are_restored_without_any_load_and_at_any_speed() -> None:
    left = replace(EPOCH, members=(member("a"), member("b")), shares=SHARES * 2,
                   placement=Placement(2, (((0, 1), (1,)),)))
    twice = PlacementConfig(min_copies=2)
    assert epoch_to_rebalance(View(GroupPhase.READY, left), plan(twice), 0.0, 0.0) is left
    assert epoch_to_rebalance(View(GroupPhase.READY, left), plan(CONFIG), 0.0, 0.0) is None
    best = BestChange(0.4, PlannedPlacement(left.placement, SHARES * 2, FIGURES), restores_copies=True)
    assert why_worth_taking(best, 0.1) == "every expert gets its copies again"
