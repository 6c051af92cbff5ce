"""The plan of a whole group: it fits, it adds up, it is near its bound, and wrong input is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planner.costs.step_costs import Workload
from cluster.planner.layer.error import PlacementError
from cluster.planner.layer.problem import Holders
from cluster.planner.layer.spare_copies import SPARE_PART
from cluster.planner.memory_plan import RunningMembers
from cluster.planner.placement import member_costs, plan_placement, predict_running, surviving_holders
from cluster.planner.placement_plan import PlacementPlan, PlannedMember, PlanOptions
from model.placement import Placement
from tests.cluster.planner.planned_members import budget, demand, member, model_args, profile
from tests.placements import contiguous_placement

ARGS = model_args()
FEW_ROWS = Workload(64, 100)
QUICK = PlanOptions(exact=False)
EXACT = PlanOptions(time_limit_s=3.0)


def plan(members: Sequence[PlannedMember], options: PlanOptions = QUICK, workload: Workload = FEW_ROWS,
         previous: Sequence[Holders] | None = None) -> PlacementPlan:
    costs = member_costs(ARGS, 2, members, workload)
    return plan_placement(costs, members, demand(ARGS), 512, options, previous)


def assert_sound(result: PlacementPlan, members: Sequence[PlannedMember], min_copies: int = 1) -> None:
    assert all(len(ranks) >= min_copies for layer in result.placement.holders for ranks in layer)
    for layer, split in zip(result.placement.holders, result.splits, strict=True):
        for ranks, parts in zip(layer, split, strict=True):
            assert len(ranks) == len(parts) and sum(parts) == pytest.approx(1)
    for rank, (one, planned) in enumerate(zip(members, result.members, strict=True)):
        assert planned.memory.budget_bytes == one.memory.budget_bytes
        assert planned.memory.free_bytes >= 0 and planned.name == one.name
        assert planned.num_expert_copies == result.placement.num_experts_of(rank)
        assert planned.memory.kv_cache_bytes >= demand(ARGS).kv_cache_bytes or planned.share.fraction == 0
        assert (planned.share.token_budget > 0) == (planned.share.fraction > 0)
    assert sum(share.fraction for share in result.shares) == pytest.approx(1)
    assert result.prediction.step_s >= result.bound_s * (1 - 1e-6)


speeds_and_sizes = st.lists(st.tuples(st.floats(0.05, 8), st.integers(0, 48), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=30)
@given(speeds_and_sizes, st.integers(1, 2), st.sampled_from([1, 40, 600]), st.sampled_from([0, 500]),
       st.sampled_from(["speed", "even"]))
def test_any_plan_is_sound_or_says_what_is_missing(kinds: list[tuple[float, int, bool]], min_copies: int,
                                                   num_rows: int, context: int, policy: str) -> None:
    members = [member(f"m{rank}", speed, budget(ARGS, copies, takes))
               for rank, (speed, copies, takes) in enumerate(kinds)]
    options = PlanOptions("even" if policy == "even" else "speed", min_copies, exact=False)
    try:
        result = plan(members, options, Workload(num_rows, context))
    except PlacementError as error:
        assert "bytes are missing" in str(error) or "min_copies" in str(error)
        return
    assert_sound(result, members, min_copies)


def test_the_exact_plan_of_unequal_members_is_near_the_best_for_experts() -> None:
    members = [member(f"m{rank}", speed, budget(ARGS, 40)) for rank, speed in enumerate((8.0, 4.0, 2.0, 1.0))]
    result = plan(members, EXACT, Workload(512, 0))
    assert_sound(result, members)
    assert result.solver == "exact"
    seconds = [time.experts_s for time in result.prediction.members]
    assert max(seconds) <= 1.01 * sum(speed * one for speed, one in zip((8, 4, 2, 1), seconds, strict=True)) / 15


def test_speed_beats_even_on_unequal_members() -> None:
    members = [member(f"m{rank}", speed) for rank, speed in enumerate((4.0, 2.0, 1.0, 1.0))]
    workload = Workload(1024, 100)
    fast, even = plan(members, EXACT, workload), plan(members, PlanOptions("even"), workload)
    assert_sound(even, members)
    assert [one.num_expert_copies for one in even.members] == [12] * 4
    assert [share.fraction for share in even.shares] == [0.25] * 4
    assert even.placement.rates == () and len(fast.placement.rates) == 4
    assert even.prediction.step_s > 1.7 * fast.prediction.step_s


@pytest.mark.parametrize("speed", [1e-4, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("num_rows", [1, 8, 512])
@pytest.mark.parametrize("bytes_per_s", [1e4, 1e9])
def test_one_more_member_never_makes_the_step_slower(speed: float, num_rows: int, bytes_per_s: float) -> None:
    members = [member("a", 2.0), member("b", 1.0)]
    workload = Workload(num_rows, 100)
    before = plan(members, QUICK, workload).prediction.step_s
    more = [*members, member("c", speed, link_bytes_per_s=bytes_per_s)]
    assert plan(more, QUICK, workload).prediction.step_s <= before * 1.003


def test_a_member_that_cannot_help_gets_neither_experts_nor_requests() -> None:
    result = plan([member("a"), member("b"), member("snail", 1e-4, link_bytes_per_s=1e4)])
    assert result.members[2].num_expert_copies == 0
    assert result.shares[2].fraction == 0.0 and result.shares[2].token_budget == 0


def test_with_memory_for_everything_members_alike_exchange_nothing() -> None:
    members = [member("a"), member("b")]
    result = plan(members, EXACT, Workload(512, 100))
    assert_sound(result, members)
    assert result.placement.holders[0] == ((0, 1),) * 16 and result.ratio == pytest.approx(1, abs=0.01)
    assert [share.fraction for share in result.shares] == pytest.approx([0.5, 0.5])
    assert all(time.exchange_s == 0 for time in result.prediction.members)


def test_an_experts_only_member_has_no_shared_weights() -> None:
    small = member("small", budget_bytes=budget(ARGS, 20, takes_requests=False))
    result = plan([member("a", budget_bytes=budget(ARGS, 40)), small])
    use = result.members[1].memory
    assert (use.shared_bytes, use.kv_cache_bytes, result.shares[1].fraction) == (0, 0, 0.0)
    assert result.members[1].num_expert_copies > 0


def test_a_plan_for_the_same_members_moves_nothing() -> None:
    members = [member("a", 2.0), member("b"), member("c")]
    first = plan(members, EXACT)
    again = plan(members, EXACT, previous=first.placement.holders)
    assert again.placement.holders == first.placement.holders and again.moved_bytes == 0


def test_after_a_loss_only_what_was_lost_is_loaded() -> None:
    names = ("a", "b", "c")
    members = [member(name) for name in names]
    first = plan(members, EXACT)
    survivors = surviving_holders(first.placement, names, ("a", "c"))
    second = plan([members[0], members[2]], QUICK, previous=survivors)
    lost = sum(not ranks for layer in survivors for ranks in layer)
    assert lost and second.moved_bytes <= 1.1 * lost * demand(ARGS).expert_bytes


def test_surviving_holders_are_renumbered() -> None:
    placement = Placement(3, (((0,), (1, 2), (0, 2)),))
    assert surviving_holders(placement, ("a", "b", "c"), ("c", "new", "a")) == (((2,), (0,), (0, 2)),)


def test_layers_with_their_own_loads_have_their_own_holders() -> None:
    load = tuple(tuple(20.0 if expert == layer else 1.0 for expert in range(16)) for layer in range(3))
    members = [member("fast", 8.0, budget(ARGS, 12)), member("b"), member("c")]
    result = plan(members, EXACT, Workload(512, 0, load))
    assert all(0 in result.placement.holders[layer][layer] for layer in range(3))


def test_the_running_placement_under_another_load() -> None:
    members = [member("a"), member("b")]
    result = plan(members, EXACT, Workload(512, 100))
    hot = ((100.0,) + (1.0,) * 15,) * 3
    same, other = (predict_running(member_costs(ARGS, 2, members, workload), result.placement, result.shares)
                   for workload in (Workload(512, 100), Workload(512, 100, hot)))
    assert same.step_s == pytest.approx(result.prediction.step_s, rel=0.01)
    assert other.step_s > same.step_s


def test_kv_rows_say_what_the_caches_hold() -> None:
    members = [member("a", budget_bytes=budget(ARGS, 48)), member("b", budget_bytes=budget(ARGS, 48))]
    tight = plan(members, QUICK, Workload(64, 4000))
    assert tight.kv_rows < 64 < plan(members, QUICK, Workload(64, 10)).kv_rows


@pytest.mark.parametrize(("members", "says"), [
    ([], "there are no members"),
    ([member("a"), member("a")], "members a are there more than once"),
    ([member("a"), replace(member("b"), profile=replace(profile(), attention_s=float("nan")))],
     "member b: attention_s is nan"),
    ([member("a", budget_bytes=budget(ARGS, 3))], "bytes are missing"),
])
def test_wrong_members_are_named(members: list[PlannedMember], says: str) -> None:
    with pytest.raises(PlacementError, match=says):
        plan(members)


def test_more_copies_than_members_are_refused() -> None:
    with pytest.raises(PlacementError, match="min_copies=2 with 1 members"):
        plan([member("a")], PlanOptions(min_copies=2))


@pytest.mark.parametrize(("previous", "says"), [
    (contiguous_placement(2, 16, (8, 8)), "the previous placement has 2 layers"),
    (contiguous_placement(3, 8, (4, 4)), r"3 layers with \[8\] experts, the model 3 with 16"),
    (contiguous_placement(3, 16, (8, 0, 8)), r"names members \[2\], there are 0..1"),
])
def test_a_wrong_previous_placement_is_refused(previous: Placement, says: str) -> None:
    with pytest.raises(PlacementError, match=says):
        plan([member("a"), member("b")], previous=previous.holders)


def test_the_running_placement_must_be_of_these_members() -> None:
    with pytest.raises(PlacementError, match="1 shares and a placement of 2 members for 2 members"):
        predict_running(member_costs(ARGS, 2, [member("a"), member("b")], Workload(1, 1)),
                        contiguous_placement(3, 16, (8, 8)), plan([member("a")]).shares)


def test_a_running_group_keeps_its_roles_and_its_room() -> None:
    """Whatever the loads: who has no KV cache gets no requests, and nobody holds more than it has room for."""
    members = [member("fast", 4.0), member("slow"), member("experts")]
    loads = tuple(tuple(40.0 if expert == layer else 1.0 for expert in range(16)) for layer in range(3))
    hot = Workload(64, 100, loads)
    running = RunningMembers(takes_requests=(True, True, False), slots_M=(30, 12, 12))
    result = plan(members, replace(QUICK, running=running), hot)
    assert [share.fraction > 0 for share in result.shares] == [True, True, False]
    assert all(result.placement.num_experts_of(rank) <= slots for rank, slots in enumerate(running.slots_M))
    with pytest.raises(PlacementError, match="room for 47 expert copies, 48 are wanted"):
        plan(members, replace(QUICK, running=replace(running, slots_M=(30, 12, 5))), hot)


def test_a_running_member_without_worth_for_requests_keeps_its_role_with_next_to_none() -> None:
    members = [member("a"), member("b"), member("snail", 1e-4)]
    running = RunningMembers(takes_requests=(True, True, True), slots_M=(48, 48, 48))
    result = plan(members, replace(QUICK, running=running))
    assert 0 < result.shares[2].fraction < 1e-3
    assert plan(members, QUICK).shares[2].fraction == 0


def test_free_slots_hold_copies_that_level_steps() -> None:
    members = [member(name, budget_bytes=budget(ARGS, 30)) for name in "abc"]
    result = plan(members)
    assert_sound(result, members)
    num_spare = round(16 * SPARE_PART) + 3
    assert sum(one.num_expert_copies for one in result.members) == 3 * (16 + num_spare)
    twice = plan(members, replace(EXACT, min_copies=2))
    assert {len(ranks) for layer in twice.placement.holders for ranks in layer} == {2}


def test_spare_copies_leave_the_kv_memory_that_is_asked_for() -> None:
    workload = Workload(64, 100)
    members = [member(name, budget_bytes=budget(ARGS, 24)) for name in "abc"]
    result = plan(members, EXACT, workload)
    assert sum(one.num_expert_copies for one in result.members) > 3 * 16 and result.kv_rows >= 64
