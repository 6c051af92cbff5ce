"""The room of members for experts beside what they hold."""

from __future__ import annotations

from dataclasses import replace

from cluster.coordinator.member_room import reachable_slots, regroup_room_bytes, room_bytes
from cluster.coordinator.reports import Report
from cluster.planner.memory_demand import PROCESS_GROWTH_BYTES
from cluster.planner.memory_plan import MemoryDemand
from model.placement import Placement
from serving.link.epoch import Epoch, Member, RequestShare
from tests.cluster.coordinator.group_reports import member, status_of

A, B = (member(name, budget=1_000) for name in "ab")
DEMAND = MemoryDemand(num_moe_layers=2, num_experts=3, expert_bytes=100, shared_bytes=0, kv_cache_bytes=0,
                      buffer_bytes=50)
EPOCH = Epoch(1, (A, B), Placement(2, (((0,), (0,), (1,)),) * 2), "", (RequestShare(0.5, 64),) * 2)


def report(one: Member, resident_bytes: int) -> Report:
    return Report(one, replace(status_of(one), resident_bytes=resident_bytes), 0.0)


def test_room_is_what_the_process_and_the_buffers_leave_of_the_budget() -> None:
    assert room_bytes(report(A, 600), DEMAND) == 350
    assert room_bytes(report(A, 2_000), DEMAND) == 0


def test_an_accelerator_has_no_room_of_its_own() -> None:
    accelerator = replace(A, facts=replace(A.facts, device="cuda:0"))
    assert room_bytes(report(accelerator, 0), DEMAND) == 0


def test_a_member_can_hold_more_when_a_layer_in_change_fits_beside_it() -> None:
    reports = {A.shard_id: report(A, 500), B.shard_id: report(B, 940)}
    assert reachable_slots(EPOCH, reports, DEMAND) == (4 + 2, 2)       # of 450 bytes two experts are in change


def test_a_member_that_has_not_reported_keeps_what_it_has() -> None:
    assert reachable_slots(EPOCH, {}, DEMAND) == (4, 2)


def test_a_survivor_s_room_is_what_the_plan_leaves_beside_the_least_kv_cache() -> None:
    demand = replace(DEMAND, shared_bytes=100, kv_cache_bytes=80)
    hosts = replace(EPOCH, shares=(RequestShare(1.0, 64), RequestShare(0.0, 0)))
    # Of 1000 bytes 10 are the process, 50 buffers, 400 and 200 experts; one has shared weights and a KV cache besides.
    assert regroup_room_bytes(report(A, 0), hosts, 0, demand) == 1_000 - 10 - 50 - 400 - 100 - 80
    assert regroup_room_bytes(report(B, 0), hosts, 1, demand) == 1_000 - 10 - 50 - 200


def test_a_survivor_that_has_grown_has_less_room_than_planned() -> None:
    budget = 10 * PROCESS_GROWTH_BYTES
    grown = replace(A, facts=replace(A.facts, memory_budget_bytes=budget))
    demand = replace(DEMAND, buffer_bytes=PROCESS_GROWTH_BYTES, kv_cache_bytes=30)
    status = replace(status_of(grown), resident_bytes=9 * PROCESS_GROWTH_BYTES, kv_cache_bytes=530)
    assert regroup_room_bytes(Report(grown, status, 0.0), EPOCH, 0, demand) == PROCESS_GROWTH_BYTES + 500
