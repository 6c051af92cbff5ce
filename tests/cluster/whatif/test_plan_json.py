from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.whatif.plan_json import plan_json
from tests.cluster.whatif.plan_questions import HYBRIDS, answer, in_fp8

FOUR = "{nodes: [{name: a, device: a100-40g-sxm, devices: 4}]}"


def test_the_object_holds_the_plan_under_names_with_units(tmp_path: Path) -> None:
    plan = answer(tmp_path, FOUR)
    found = json.loads(plan_json(plan))
    assert plan.plan is not None
    assert (found["figures"], found["fits"], found["missing_bytes"], found["to_fit"]) == ("data-sheet", True, 0, None)
    assert found["plan"]["tokens_per_s"] == plan.plan.prediction.tokens_per_s
    assert len(found["plan"]["holders"]) == 32 and len(found["plan"]["holders"][0]) == 8
    for member in found["plan"]["members"]:
        memory = member["memory"]
        assert memory.pop("budget_bytes") == sum(memory.values())
    assert sum(member["request_share"] for member in found["plan"]["members"]) == 1
    assert found["even"]["fits"] and found["one_more_node"]["a"]["tokens_per_s"] > 0
    assert found["nodes"][0]["figures"] == "data-sheet" and found["nodes"][0]["url"].startswith("https://")


@pytest.mark.parametrize("model", HYBRIDS, ids=lambda path: path.stem)
def test_fp8_counts_in_files_and_what_it_becomes_in_memory(model: Path, tmp_path: Path) -> None:
    cluster = "{nodes: [{name: t4, device: t4}]}"       # too little for any of them, which is soon said
    whole, fp8 = (json.loads(plan_json(answer(tmp_path, cluster, path)))["checkpoint"]
                  for path in (model, in_fp8(model, tmp_path)))
    assert whole["fp8_block_size"] is None and fp8["fp8_block_size"] == [128, 128]
    assert whole["loaded_bytes"] == fp8["loaded_bytes"]
    assert 0.50 < fp8["stored_bytes"] / fp8["loaded_bytes"] < 0.53 and whole["stored_bytes"] < whole["loaded_bytes"]


def test_a_model_that_does_not_fit_has_no_plan_but_remedies(tmp_path: Path) -> None:
    found = json.loads(plan_json(answer(tmp_path, FOUR, min_copies=2)))
    assert not found["fits"] and found["plan"] is None and found["missing_bytes"] > 0
    assert found["to_fit"] == {"more_nodes": {"a": {"num_nodes": 1, "max_batch_tokens": 2048}},
                               "max_batch_tokens": None, "one_copy_fits": True}
