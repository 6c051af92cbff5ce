"""Questions about the hybrids of examples/models, on the example clusters: how their caches are divided."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from cluster.whatif.answer import PlanAnswer, answer_question
from cluster.whatif.page import plan_page
from cluster.whatif.plan_json import plan_json
from cluster.whatif.request import PlanRequest, read_question
from model.args import parse_model_args
from model.json_file import read_json_object
from model.memory import expert_bytes, kv_block_bytes, shared_bytes, state_slot_bytes
from serving.config import ConfigError
from tests.cluster.whatif.plan_questions import EXAMPLES
from tests.cluster.whatif.test_text import shown

NEXT = "Qwen3-Next-80B-A3B-Instruct"
HYBRIDS = {NEXT: 80, "Qwen3.5-35B-A3B": 35, "Qwen3.5-397B-A17B": 397}    # billion weights
CLUSTERS = sorted((EXAMPLES / "clusters").glob("*.yaml"))


@cache
def answer(model: str, cluster: Path, **fields: int) -> PlanAnswer:
    request = PlanRequest(EXAMPLES / f"models/{model}.json", cluster, fast=True, **fields)     # type: ignore[arg-type]
    return answer_question(read_question(request), lambda what: None)


@pytest.mark.parametrize(("model", "billions"), HYBRIDS.items())
def test_the_weights_come_to_what_the_name_says(model: str, billions: int) -> None:
    args = parse_model_args(read_json_object(EXAMPLES / f"models/{model}.json"))
    weights = shared_bytes(args, 2) // 2 + args.num_moe_layers * args.num_experts * expert_bytes(args, 1)
    assert weights / 1e9 == pytest.approx(billions, rel=0.015)
    assert len(args.attention_layers) * 4 == args.num_layers and args.context_limit == 262144 and args.rotary_dim == 64


def test_a_state_slot_by_hand() -> None:
    """Qwen3.5-35B-A3B: 30 layers, 32 states of 128 x 128 in fp32, and 3 rows of 8,192 channels in bf16."""
    args = parse_model_args(read_json_object(EXAMPLES / "models/Qwen3.5-35B-A3B.json"))
    assert state_slot_bytes(args, 2) == 30 * (32 * 128 * 128 * 4 + 3 * (2 * 2048 + 4096) * 2)
    assert kv_block_bytes(args, 1, 2) == 10 * 2 * 2 * 256 * 2


# Every cluster with one model, and the others where their 512 experts do not take the solver tens of seconds.
PAIRS = [(model, cluster) for model in HYBRIDS for cluster in CLUSTERS
         if model == "Qwen3.5-35B-A3B" or cluster.stem == "8xH100" or (model != NEXT and cluster.stem != "two-vendors")]


@pytest.mark.parametrize(("model", "cluster"), PAIRS, ids=lambda value: getattr(value, "stem", value))
def test_every_cluster_is_answered(model: str, cluster: Path) -> None:
    found = answer(model, cluster)
    text = shown(found)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80 and "…" not in text
    if found.plan is None:
        assert f"{found.missing_bytes:,} bytes" in text and "KV cache, states" in text
        return
    assert "it fits" in text and f"{found.num_state_slots:,} slots of" in text
    slot_bytes = found.question.state_slot_bytes
    for member, planned in zip(found.plan.members, found.members, strict=True):
        use = member.memory
        assert use.budget_bytes == planned.memory.budget_bytes and use.state_bytes % slot_bytes == 0
        assert (use.state_bytes >= 3 * slot_bytes) == (member.share.fraction > 0)
        assert min(use.kv_cache_bytes, use.free_bytes) >= 0


def test_contexts_up_to_the_models_limit() -> None:
    cluster = EXAMPLES / "clusters/8xH100.yaml"
    short, long = (answer("Qwen3.5-35B-A3B", cluster, batch=4, context_tokens=context) for context in (4096, 262144))
    assert short.plan is not None and long.plan is not None
    assert long.num_held_rows >= 4 and long.num_state_slots < short.num_state_slots 
    assert long.plan.prediction.step_s > short.plan.prediction.step_s
    with pytest.raises(ConfigError, match="262145.*262144 positions"):
        answer("Qwen3.5-35B-A3B", cluster, context_tokens=262145)


def test_the_json_and_the_page_show_the_two_parts_of_the_cache() -> None:
    found = answer("Qwen3.5-35B-A3B", EXAMPLES / "clusters/8xH100.yaml")
    content = json.loads(plan_json(found))
    assert content["state_slot_bytes"] == 64_389_120
    memories = [member["memory"] for member in content["plan"]["members"]]
    assert sum(memory["state_bytes"] for memory in memories) == content["state_slots"] * content["state_slot_bytes"]
    for memory in memories:
        assert memory.pop("budget_bytes") == sum(memory.values())
    assert "states" in plan_page(found)
