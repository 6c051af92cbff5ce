"""Stale rates cost time, and running members can change to better ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.planner.costs.device_curves import expert_rate
from cluster.planner.costs.measured_profile import corrected
from cluster.planner.group_plan import best_change, group_costs, plan_group, slowdown_of_rates
from model.arrays import FloatArray
from model.placement import ExpertRate, Placement
from serving.link.epoch import Epoch, RequestShare, WorkRatio
from tests.cluster.coordinator.group_reports import member, rules
from tests.cluster.profiles import PROFILE

PLAN = rules().plan
OLD = (expert_rate(PROFILE),) * 3
SLOW_B = corrected(PROFILE, WorkRatio(1.0, 3.0, 50), 2)
NEW = (expert_rate(PROFILE), expert_rate(SLOW_B), expert_rate(PROFILE))
HOLDERS = (((0, 1), (1, 2), (0, 1), (1, 2), (0, 1), (1, 2)),) * 2
SLOTS = (6, 6, 6)            # copies in both layers together
SHARES = (RequestShare(0.5, 64), RequestShare(0.0, 0), RequestShare(0.5, 64))


def epoch(placement: Placement) -> Epoch:
    a, b, c = (member(name) for name in "abc")
    return Epoch(1, (a, replace(b, profile=SLOW_B), c), placement, "", SHARES)


def slowdown(placement: Placement, load_LE: FloatArray | None, rates: tuple[ExpertRate, ...]) -> float:
    return slowdown_of_rates(group_costs(epoch(placement).members, PLAN, load_LE), placement, SHARES, rates)


@pytest.mark.parametrize("load_LE", [None, np.full((2, 6), 50.0)])
def test_rates_of_before_give_a_slow_member_too_many_rows(load_LE: np.ndarray | None) -> None:
    stale = slowdown(Placement(3, HOLDERS, OLD), load_LE, NEW)
    assert stale > 1.02
    assert slowdown(Placement(3, HOLDERS, NEW), load_LE, OLD) == pytest.approx(1 / stale)


def test_rates_cost_nothing_when_they_are_right_or_nothing_has_copies() -> None:
    assert slowdown(Placement(3, HOLDERS, NEW), None, NEW) == 1.0
    single = Placement(3, (((0,), (1,), (2,), (0,), (1,), (2,)),) * 2, OLD)
    assert slowdown(single, None, NEW) == 1.0


def test_what_runs_as_well_stays_and_only_gets_new_rates() -> None:
    planned = best_change(epoch(Placement(3, HOLDERS, OLD)), PLAN, None, SLOTS).target
    stale = replace(epoch(replace(planned.placement, rates=OLD)), figures=replace(planned.figures, solver="given"))
    best = best_change(stale, PLAN, None, SLOTS)
    assert best.target.placement.holders == planned.placement.holders and best.target.shares == SHARES
    assert best.target.placement.rates == planned.placement.rates != OLD
    assert best.target.figures is not None and best.target.figures.solver == "given"
    assert best.running_s >= best.target.figures.step_s >= best.target.figures.bound_s


def test_hot_experts_are_moved_apart() -> None:
    together = Placement(3, (((0,), (0,), (1,), (1,), (2,), (2,)),) * 2, OLD)
    best = best_change(epoch(together), PLAN, np.array([[400.0, 400.0, 1.0, 1.0, 1.0, 1.0]] * 2), SLOTS)
    assert best.target.placement.holders != together.holders
    assert best.target.figures is not None and best.target.figures.step_s < 0.97 * best.running_s


def test_copies_that_went_with_a_member_come_back_though_the_step_gets_no_faster() -> None:
    twice = replace(PLAN, config=PLAN.config.model_copy(update={"min_copies": 2}))
    left = epoch(Placement(3, (((0, 1), (1,), (0, 1), (1, 2), (0, 1), (1, 2)),) * 2, NEW))
    best = best_change(left, twice, None, (12, 12, 12))
    assert best.restores_copies
    assert all(len(ranks) >= 2 for layer in best.target.placement.holders for ranks in layer)


def test_who_runs_keeps_its_role_when_another_joins() -> None:
    """Memory lets one of two take requests, either as well as the other."""
    a, b = member("a", budget=640), member("b", budget=740)
    free = plan_group((a, b), PLAN)
    taker = [share.fraction > 0 for share in free.shares].index(True)
    other = (b, a)[taker]
    runs = Epoch(1, (other,), Placement(1, (((0,),) * 6,) * 2), "", (RequestShare(1.0, 64),))
    kept = plan_group((a, b), PLAN, runs)
    assert sum(share.fraction > 0 for share in free.shares) == sum(share.fraction > 0 for share in kept.shares) == 1
    assert kept.shares[taker].fraction == 0.0
