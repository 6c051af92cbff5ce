"""Members hold a model, or it is said what is missing: as the planner finds it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planner.costs.step_costs import Workload
from cluster.planner.layer.error import PlacementError
from cluster.planner.memory_fit import MemoryFit, Policy, does_not_fit, memory_fit
from cluster.planner.memory_plan import MemberMemory, MemoryDemand, max_slots
from cluster.planner.placement import member_costs, plan_placement
from cluster.planner.placement_plan import PlannedMember, PlanOptions
from tests.cluster.planner.planned_members import MB, budget, demand, member, model_args

DEMAND = MemoryDemand(num_moe_layers=5, num_experts=8, expert_bytes=100, shared_bytes=1000, kv_cache_bytes=300,
                      buffer_bytes=200)
FIXED = DEMAND.fixed_bytes + 50
ARGS = model_args()
policies = st.sampled_from(["speed", "even"])


def memories(*free: int) -> tuple[MemberMemory, ...]:
    """With so much for experts where a member takes requests too."""
    return tuple(MemberMemory(f"node-{index}", FIXED + left, 50) for index, left in enumerate(free))


def raised(fit: MemoryFit) -> list[MemberMemory]:
    return [replace(one.memory, budget_bytes=one.memory.budget_bytes + one.missing_bytes) for one in fit.members]


@given(st.lists(st.integers(0, 6000), min_size=1, max_size=6), st.integers(0, 4), st.integers(1, 9))
def test_where_all_take_requests_the_slots_decide(free: list[int], num_layers: int, num_experts: int) -> None:
    demand = replace(DEMAND, num_moe_layers=num_layers, num_experts=num_experts)
    members = memories(*free)
    assert memory_fit(members, demand, 1, "even").is_enough == (
        sum(max_slots(memory, demand) for memory in members) >= demand.num_slots)


@given(st.lists(st.integers(-3000, 4500), min_size=1, max_size=5), st.integers(1, 2), policies)
def test_the_missing_bytes_are_enough(free: list[int], num_copies: int, policy: Policy) -> None:
    """Also where one member has room for every expert, and more of it would be no use."""
    fit = memory_fit(memories(*free), DEMAND, min(num_copies, len(free)), policy)
    assert memory_fit(raised(fit), DEMAND, fit.num_copies, policy).is_enough


def test_one_member_that_takes_requests_is_enough() -> None:
    fit = memory_fit(memories(1500, 2500 - 1300), DEMAND, 1)
    assert fit.is_enough and [one.takes_requests for one in fit.members] == [True, False]
    assert not memory_fit(memories(1500, 2500 - 1300), DEMAND, 1, "even").is_enough


def test_two_copies_miss_as_much_as_they_take() -> None:
    assert memory_fit(memories(2000, 2000), DEMAND, 1).is_enough
    assert memory_fit(memories(2000, 2000), DEMAND, 2, "even").missing_bytes == 4000
    assert memory_fit(memories(2000, 2000), DEMAND, 2).missing_bytes == 2700
    assert memory_fit(memories(4000, 4000 - 1300), DEMAND, 2).is_enough


def test_who_has_no_room_for_buffers_is_left_out() -> None:
    fit = memory_fit(memories(4000, -9000), DEMAND, 1)
    assert fit.is_enough and fit.members[1].free_bytes < 0
    two = memory_fit(memories(4000, -1900), DEMAND, 2)      # then it is needed, buffers and all
    assert [one.missing_bytes for one in two.members] == [0, 600 + 4000]


def plan(members: Sequence[PlannedMember], options: PlanOptions) -> None:
    plan_placement(member_costs(ARGS, 2, members, Workload(64, 100)), members, demand(ARGS), 512, options)


kinds = st.lists(st.tuples(st.floats(1e-4, 8), st.integers(0, 50), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=40)
@given(kinds, st.integers(1, 2), policies)
def test_the_planner_finds_a_plan_exactly_when_it_fits(some: list[tuple[float, int, bool]], num_copies: int,
                                                       policy: Policy) -> None:
    """Whatever the speeds are: slow members are given little, but what must be there is."""
    members = [member(f"m{rank}", speed, budget(ARGS, copies, takes))
               for rank, (speed, copies, takes) in enumerate(some)]
    options = PlanOptions(policy, min(num_copies, len(members)), exact=False)
    fit = memory_fit([one.memory for one in members], demand(ARGS), options.min_copies, policy)
    if fit.is_enough:
        plan(members, options)
    else:
        with pytest.raises(PlacementError, match=f"{fit.missing_bytes} bytes are missing"):
            plan(members, options)


def test_a_slow_member_takes_the_requests_when_no_other_can() -> None:
    """The fast one has room for all experts and nothing else; nobody would give the slow one requests for its speed."""
    fast = member("fast", 1.0, budget(ARGS, 48, takes_requests=False))
    slow = member("slow", 1e-4, budget(ARGS, 48))
    plan([fast, slow], PlanOptions(min_copies=2, exact=False))


def test_what_is_missing_is_said_of_every_member() -> None:
    few = budget(ARGS, 10)
    fit = memory_fit([member(name, budget_bytes=few).memory for name in "ab"], demand(ARGS), 1)
    text = str(does_not_fit(fit))
    assert f"the 2 members cannot hold the model: {fit.missing_bytes} bytes are missing" in text
    assert "member a:" in text and "member b:" in text and "min_copies" not in text
    twice = memory_fit([member(name, budget_bytes=few).memory for name in "ab"], demand(ARGS), 2)
    assert "set min_copies to 1" in str(does_not_fit(twice))


def test_a_member_too_small_for_anything_does_not_fit() -> None:
    assert not memory_fit([member("a", budget_bytes=4 * MB).memory], demand(ARGS), 1).is_enough
