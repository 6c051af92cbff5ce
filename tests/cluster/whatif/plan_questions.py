"""Questions for tests of `moesaic plan`."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.whatif.answer import PlanAnswer, answer_question
from cluster.whatif.question import PlanQuestion
from cluster.whatif.request import PlanRequest, read_question

EXAMPLES = Path(__file__).parents[3] / "examples"
SMALL_MODEL = EXAMPLES / "models/Mixtral-8x7B-v0.1.json"
MANY_EXPERTS = EXAMPLES / "models/Qwen3-30B-A3B.json"
HYBRIDS = (EXAMPLES / "models/Qwen3.5-35B-A3B.json", EXAMPLES / "models/Qwen3.5-397B-A17B.json",
           EXAMPLES / "models/Qwen3-Next-80B-A3B-Instruct.json")
HUGE_MODEL = EXAMPLES / "models/Qwen3-235B-A22B.json"


def in_fp8(model: Path, folder: Path) -> Path:
    """Write the same model's config.json as of a checkpoint in blocks of fp8."""
    config = json.loads(model.read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path = folder / f"{model.stem}-FP8.json"
    path.write_text(json.dumps(config))
    return path


def question(folder: Path, cluster: str, model: Path = SMALL_MODEL, batch: int | None = None,
             context_tokens: int | None = None, min_copies: int | None = None) -> PlanQuestion:
    """`cluster`: the content of a cluster file. The quick solver."""
    path = folder / "cluster.yaml"
    path.write_text(cluster)
    return read_question(PlanRequest(model, path, batch, context_tokens, min_copies=min_copies, fast=True))


def answer(folder: Path, cluster: str, model: Path = SMALL_MODEL, batch: int | None = None,
           context_tokens: int | None = None, min_copies: int | None = None) -> PlanAnswer:
    return answer_question(question(folder, cluster, model, batch, context_tokens, min_copies), lambda what: None)
