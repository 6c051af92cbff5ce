"""Roles and slots: what memory allows, and what a member is better left out of."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.planner.costs.step_costs import StepCosts, Workload
from cluster.planner.member_roles import choose_roles
from cluster.planner.placement_plan import PlannedMember
from cluster.planner.role_fit import MemoryPlanner, Roles, slots_of_layers
from serving.link.epoch import Link
from tests.cluster.planner.planned_members import MB, budget, demand, member, model_args

ARGS = model_args()


def planner(*members: PlannedMember, num_rows: int = 64, context_tokens: int = 100,
            min_copies: int = 1) -> MemoryPlanner:
    costs = StepCosts(ARGS, 2, [one.profile for one in members], Workload(num_rows, context_tokens))
    return MemoryPlanner(costs, demand(ARGS), tuple(one.memory for one in members), min_copies)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 9))
def test_no_slot_is_wasted_and_layers_are_alike(slots_M: list[int], num_layers: int) -> None:
    layers = slots_of_layers(slots_M, num_layers)
    assert [sum(layer[rank] for layer in layers) for rank in range(len(slots_M))] == slots_M
    for rank in range(len(slots_M)):
        assert max(layer[rank] for layer in layers) - min(layer[rank] for layer in layers) <= 1
    assert max(map(sum, layers)) - min(map(sum, layers)) <= 1


def test_where_all_fits_all_do_everything() -> None:
    fit = choose_roles(planner(member("a"), member("b")))
    assert fit.roles == Roles((True, True), (True, True))
    assert fit.kv_part == 1.0 and fit.slots_M == (48, 48)


def test_a_member_too_small_for_shared_weights_holds_experts_only() -> None:
    small = member("small", budget_bytes=budget(ARGS, 20, takes_requests=False))
    fit = choose_roles(planner(member("a", budget_bytes=budget(ARGS, 40)), small))
    assert fit.roles == Roles((True, False), (True, True))
    assert fit.slots_M[1] == 20


def test_attention_is_given_up_for_experts_when_memory_is_tight() -> None:
    """Both can hold the shared weights, but then the experts do not fit."""
    one = budget(ARGS, 23)
    fit = choose_roles(planner(member("a", 2.0, one), member("b", 1.0, one)))
    assert fit.roles.takes_requests == (True, False)
    assert sum(fit.slots_M) >= 48


def test_kv_cache_is_kept_for_the_workload_when_it_can_be() -> None:
    roomy = planner(member("a", budget_bytes=budget(ARGS, 40) + 20 * MB), member("b"), context_tokens=400)
    fit = choose_roles(roomy)
    assert fit.kv_part == 1.0
    assert sum(roomy.max_rows(fit.roles.takes_requests, fit.slots_M)) >= 63.9


def test_a_member_that_slows_the_step_is_left_out() -> None:
    fit = choose_roles(planner(member("a"), member("b"), member("snail", 1e-4, link_bytes_per_s=1e4)))
    assert fit.roles == Roles((True, True, False), (True, True, False))


def test_members_take_part_as_far_as_the_measured_exchange_is_worth_it() -> None:
    """Each of three could do it alone: how many rows it takes to share them depends on what an exchange costs."""
    def num_taking_part(latency_s: float, num_rows: int) -> int:
        members = [replace(one, profile=replace(one.profile, link=Link(latency_s, 1e9))) for one in map(member, "abc")]
        return sum(choose_roles(planner(*members, num_rows=num_rows)).roles.holds_experts)

    assert [num_taking_part(15e-6, num_rows) for num_rows in (1, 16, 256)] == [3, 3, 3]
    assert [num_taking_part(300e-6, num_rows) for num_rows in (1, 16, 64)] == [1, 1, 3]
    assert [num_taking_part(3e-3, num_rows) for num_rows in (1, 64, 256)] == [1, 1, 1]


def test_who_takes_requests_already_goes_on_where_that_costs_little() -> None:
    one = budget(ARGS, 23)
    two = planner(member("a", 1.02, one), member("b", 1.0, one))        # either, and a is a little faster
    assert choose_roles(two).roles.takes_requests == (True, False)
    assert choose_roles(replace(two, kept_roles=(False, True))).roles.takes_requests == (False, True)
    assert choose_roles(replace(two, kept_roles=(None, None))).roles.takes_requests == (True, False)
    assert choose_roles(replace(two, kept_roles=(True, True))).roles.takes_requests == (True, False)   # no room


def test_a_role_that_costs_much_is_changed() -> None:
    two = planner(member("a"), member("b"), num_rows=256)
    assert choose_roles(replace(two, kept_roles=(True, False))).roles.takes_requests == (True, True)
    assert choose_roles(replace(two, kept_roles=(False, False))).roles.takes_requests == (True, True)   # nobody would
