from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.planner.layer.error import PlacementError
from cluster.planner.memory_fit import memory_fit
from cluster.whatif.answer import PlanAnswer, answer_question
from cluster.whatif.cluster_file import with_more_nodes
from cluster.whatif.request import PlanRequest, read_question
from tests.cluster.whatif.plan_questions import EXAMPLES, HUGE_MODEL, MANY_EXPERTS, answer, question

ONE_H200 = "{nodes: [{name: a, device: h200-sxm}]}"
TWO_T4 = "{nodes: [{name: t4, device: t4, devices: 2}], link: {bandwidth: 12.5GB/s}}"


@pytest.fixture(scope="module")
def huge() -> PlanAnswer:
    """235 billion parameters on 12 devices of two kinds."""
    request = PlanRequest(HUGE_MODEL, EXAMPLES / "clusters/4xH100-8xA100-40G.yaml", fast=True)
    return answer_question(read_question(request), lambda what: None)


def test_one_sequence_on_one_device_takes_the_reading_of_the_weights_it_activates(tmp_path: Path) -> None:
    """By hand. Qwen3-30B-A3B in bf16, a context of one token: every weight that the token needs is read once."""
    found = answer(tmp_path, ONE_H200, MANY_EXPERTS, batch=1, context_tokens=1).plan
    assert found is not None
    of_layer = 2048 * (2 * 32 * 128 + 2 * 4 * 128) + 2048 * 128 + 8 * 3 * 2048 * 768    # attention, gate, 8 experts
    activated_bytes = 2 * (48 * of_layer + 151936 * 2048)                                   # and the output layer
    assert activated_bytes == pytest.approx(6.1e9, rel=0.01)
    by_hand_s = activated_bytes / (0.8 * 4.8e12) + 48 * 50e-6       # 80 % of the data sheet's 4.8 TB/s; 50 us a layer
    assert found.prediction.step_s == pytest.approx(by_hand_s, rel=0.005)
    assert found.prediction.tokens_per_s == pytest.approx(251, rel=0.01)


def test_the_bytes_of_every_member_add_up_to_its_budget(huge: PlanAnswer) -> None:
    assert huge.plan is not None
    for member, planned in zip(huge.plan.members, huge.members, strict=True):
        assert member.memory.budget_bytes == planned.memory.budget_bytes
        assert min(member.memory.free_bytes, member.memory.kv_cache_bytes) >= 0
        assert member.memory.expert_bytes == member.num_expert_copies * huge.demand.expert_bytes


def test_a_plan_is_never_slower_than_even_placement_and_never_faster_than_the_bound(huge: PlanAnswer) -> None:
    assert huge.plan is not None and huge.even is not None
    assert huge.even.tokens_per_s is None or huge.even.tokens_per_s <= huge.plan.prediction.tokens_per_s * 1.001
    assert huge.plan.ratio >= 1


def test_one_more_node_of_each_kind_is_planned(huge: PlanAnswer) -> None:
    assert huge.plan is not None
    assert [outlook.what for outlook in huge.one_more] == ["h100", "a100"]
    assert all(outlook.tokens_per_s and outlook.tokens_per_s >= 0.99 * huge.plan.prediction.tokens_per_s
               for outlook in huge.one_more)


def test_what_does_not_fit_says_what_would(tmp_path: Path) -> None:
    lacking = answer(tmp_path, TWO_T4)
    assert lacking.plan is None and lacking.missing_bytes > 0
    asked = question(tmp_path, TWO_T4)
    (remedy,) = lacking.remedies
    assert remedy.num_more_nodes is not None
    enough, too_few = (with_more_nodes(asked.cluster, "t4", number)
                       for number in (remedy.num_more_nodes, remedy.num_more_nodes - 1))
    assert answer_question(replace(asked, cluster=enough), lambda what: None).plan is not None
    assert answer_question(replace(asked, cluster=too_few), lambda what: None).plan is None


def test_the_missing_bytes_are_enough(tmp_path: Path) -> None:
    lacking = answer(tmp_path, TWO_T4)
    first, second = lacking.members
    grown = replace(first, memory=replace(first.memory, budget_bytes=first.memory.budget_bytes + lacking.missing_bytes))
    assert memory_fit([grown.memory, second.memory], lacking.demand, 1).is_enough


def test_a_member_without_room_for_its_buffers_is_left_out(tmp_path: Path) -> None:
    found = answer(tmp_path, "{nodes: [{name: a, device: h200-sxm}, {name: tiny, device: t4, memory_budget: 1GB}], "
                             "link: {bandwidth: 10GB/s}}")
    assert found.missing_bytes == 0 and found.plan is not None
    assert found.plan.members[1].num_expert_copies == 0 and found.plan.members[1].share.fraction == 0


def test_two_copies_need_two_devices(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="min_copies=2 with 1 device"):
        answer(tmp_path, ONE_H200, min_copies=2)


def test_two_copies_that_do_not_fit_say_that_one_does(tmp_path: Path) -> None:
    cluster = "{nodes: [{name: a, device: a100-40g-sxm, devices: 4}]}"
    assert answer(tmp_path, cluster, min_copies=2).fits_with_one_copy
    assert answer(tmp_path, cluster).plan is not None


def test_more_nodes_that_are_enough_only_with_fewer_tokens_a_step_say_so(tmp_path: Path) -> None:
    cluster = ("{nodes: [{name: big, device: h100-sxm}, {name: l4, device: l4, devices: 8}], "
               "link: {bandwidth: 10GB/s}}")
    _, remedy = answer(tmp_path, cluster, HUGE_MODEL).remedies
    assert remedy.num_more_nodes is not None and remedy.max_batch_tokens == 256


def test_fewer_tokens_a_step_can_make_it_fit(tmp_path: Path) -> None:
    """Twelve devices that can send all their rows to one: buffers are what is too large."""
    cluster = "{{nodes: [{{name: t4, device: t4, devices: 12, memory_budget: {}}}]}}"
    asked = question(tmp_path, cluster.format("1GB"))
    demand = asked.demand(asked.cluster)
    needed = demand.num_slots * demand.expert_bytes + demand.fixed_bytes + 11 * demand.buffer_bytes
    tight = answer(tmp_path, cluster.format(needed // 12))
    assert tight.plan is None and tight.fitting_batch_tokens == 1024
    scheduler = asked.config.scheduler.model_copy(update={"max_batch_tokens": 1024})
    smaller = replace(tight.question, config=asked.config.model_copy(update={"scheduler": scheduler}))
    assert answer_question(smaller, lambda what: None).plan is not None


def test_a_kv_cache_that_is_too_small_gives_the_speed_of_what_it_holds(tmp_path: Path) -> None:
    roomy = answer(tmp_path, ONE_H200, batch=64, context_tokens=4096)
    assert roomy.held is None and roomy.kv_tokens >= roomy.wanted_kv_tokens == 64 * 4096
    tight = answer(tmp_path, "{nodes: [{name: a, device: h200-sxm, memory_budget: 100GB}]}", batch=64,
                   context_tokens=4096)
    assert tight.plan is not None and tight.held is not None and tight.held.tokens_per_s is not None
    assert 0 < tight.num_held_rows < 64
    assert tight.held.tokens_per_s < tight.plan.prediction.tokens_per_s


def test_equal_parts_that_do_not_fit_say_what_is_missing(tmp_path: Path) -> None:
    cluster = ("{nodes: [{name: big, device: h200-sxm}, {name: small, device: t4, memory_budget: 2GB}], "
               "link: {bandwidth: 10GB/s}}")
    asked = question(tmp_path, cluster)
    even = answer_question(replace(asked, options=replace(asked.options, policy="even")), lambda what: None)
    assert answer_question(asked, lambda what: None).plan is not None
    assert even.plan is None and even.missing_bytes > 0 and even.fitting_batch_tokens is None
