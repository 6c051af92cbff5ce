from __future__ import annotations

from pathlib import Path

from cluster.whatif.member_groups import experts_a_layer, member_groups
from model.placement import Placement
from tests.cluster.whatif.plan_questions import answer
from tests.placements import contiguous_placement

TWO_KINDS = "{nodes: [{name: a, device: h100-sxm, devices: 2}, {name: b, device: a100-40g-sxm, devices: 3}], " \
            "link: {bandwidth: 400GB/s}}"


def test_every_member_is_in_one_group_of_its_kind(tmp_path: Path) -> None:
    plan = answer(tmp_path, TWO_KINDS)
    assert plan.plan is not None
    groups = member_groups(plan, plan.plan)
    assert sorted(rank for group in groups for rank in group.ranks) == [0, 1, 2, 3, 4]
    for group in groups:
        assert {plan.members[rank].pool for rank in group.ranks} == {group.kind}
        assert len({member.share.token_budget for member in group.members}) == 1
        few, most = group.num_copies
        assert most - few <= max(1, 0.2 * most)


def test_experts_are_named_where_all_layers_agree_and_counted_where_not() -> None:
    alike = contiguous_placement(3, 8, (4, 2, 2))
    assert experts_a_layer(alike, (0,)) == "0-3" and experts_a_layer(alike, (1, 2)) == "4-7"
    differs = Placement(2, (((0,), (1,), (1,)), ((1,), (0,), (0,))))
    assert experts_a_layer(differs, (0,)) == "1-2 a layer"
    assert experts_a_layer(contiguous_placement(1, 2, (2, 0)), (1,)) == "none"
