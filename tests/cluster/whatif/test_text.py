from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cluster.whatif.answer import PlanAnswer, answer_question
from cluster.whatif.request import PlanRequest, read_question
from cluster.whatif.text import plan_view
from tests.cluster.whatif.plan_questions import EXAMPLES, HYBRIDS, MANY_EXPERTS, answer, in_fp8


def shown(plan: PlanAnswer) -> str:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with console.capture() as captured:
        console.print(plan_view(plan), highlight=False)
    return captured.get()


@pytest.mark.parametrize("path", sorted((EXAMPLES / "clusters").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_answered_within_80_columns(path: Path) -> None:
    plan = answer_question(read_question(PlanRequest(MANY_EXPERTS, path, fast=True)), lambda what: None)
    text = shown(plan)
    assert plan.plan is not None and "it fits; figures: data-sheet" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text and f"{plan.plan.prediction.tokens_per_s:,.0f} tokens/s" in text
    for nodes in plan.question.cluster.nodes:
        assert f"+1 {nodes.name}" in text and f"{nodes.name}, data sheet:" in text


def test_devices_whose_plans_are_alike_share_a_line(tmp_path: Path) -> None:
    text = shown(answer(tmp_path, "{nodes: [{name: a, device: a100-40g-sxm, devices: 4}]}"))
    assert text.count("4 x a ") == 2 and "a-0" not in text      # memory, roles


def test_what_does_not_fit_says_by_how_much_and_what_would(tmp_path: Path) -> None:
    lacking = answer(tmp_path, "{nodes: [{name: t4, device: t4, devices: 2}]}")
    text = shown(lacking)
    assert "it does not fit" in text and f"{lacking.missing_bytes:,} bytes" in text
    assert f"{lacking.remedies[0].num_more_nodes} more nodes of t4" in text and "tokens/s" not in text


@pytest.mark.parametrize(("budget", "fits"), [("100GB", True), ("10GB", False)])
def test_what_fp8_takes_in_files_and_in_memory_is_said(budget: str, fits: bool, tmp_path: Path) -> None:
    cluster = f"{{nodes: [{{name: a, device: h200-sxm, memory_budget: {budget}}}]}}"
    plan = answer(tmp_path, cluster, in_fp8(HYBRIDS[0], tmp_path))
    text = shown(plan)
    assert (plan.plan is not None) is fits and max(len(line.rstrip()) for line in text.splitlines()) <= 80
    files, memory = plan.question.stored_bytes / 1e9, plan.question.loaded_bytes / 1e9
    assert (f"{files:,.1f} GB in files (fp8 in blocks of 128 x 128), {memory:,.1f} GB in memory (bfloat16)"
            in " ".join(text.split()))


def test_a_small_kv_cache_is_said(tmp_path: Path) -> None:
    text = " ".join(shown(answer(tmp_path, "{nodes: [{name: a, device: h200-sxm, memory_budget: 100GB}]}")).split())
    assert "if their KV cache had room" in text and "of the sequences run at once" in text
