"""Members that hold everything and exchange nothing: only those that can, and only as many as help."""

from __future__ import annotations

import pytest

from cluster.planner.costs.step_costs import StepCosts, Workload
from cluster.planner.local_placement import choose_local
from cluster.planner.placement_plan import PlannedMember
from cluster.planner.role_fit import MemoryPlanner
from tests.cluster.planner.planned_members import budget, demand, member, model_args

ARGS = model_args()


def planner(*members: PlannedMember, num_rows: int = 512, min_copies: int = 1) -> MemoryPlanner:
    costs = StepCosts(ARGS, 2, [one.profile for one in members], Workload(num_rows, 0))
    return MemoryPlanner(costs, demand(ARGS), tuple(one.memory for one in members), min_copies)


def test_rows_follow_speed() -> None:
    fit = choose_local(planner(member("a", 3.0), member("b", 1.0), num_rows=2048))
    assert fit is not None and fit.takes_requests == (True, True)
    assert fit.rows_M == pytest.approx([1536, 512], rel=0.02)


def test_who_cannot_hold_everything_is_left_out() -> None:
    fit = choose_local(planner(member("a"), member("b", budget_bytes=budget(ARGS, 47)), member("c")))
    assert fit is not None and fit.takes_requests == (True, False, True)
    assert choose_local(planner(member("a", budget_bytes=budget(ARGS, 47)))) is None


def test_who_would_only_be_waited_for_is_left_out() -> None:
    fit = choose_local(planner(member("a"), member("snail", 0.001), num_rows=4))
    assert fit is not None and fit.rows_M.tolist() == pytest.approx([4, 0])


def test_copies_on_fewer_members_than_asked_are_no_choice() -> None:
    assert choose_local(planner(member("a"), member("b", budget_bytes=budget(ARGS, 47)), min_copies=2)) is None
