"""Questions for tests of `moesaic plan`."""

from __future__ import annotations

from pathlib import Path

from cluster.whatif.answer import PlanAnswer, answer_question
from cluster.whatif.question import PlanQuestion
from cluster.whatif.request import PlanRequest, read_question

EXAMPLES = Path(__file__).parents[3] / "examples"
SMALL_MODEL = EXAMPLES / "models/Mixtral-8x7B-v0.1.json"
MANY_EXPERTS = EXAMPLES / "models/Qwen3-30B-A3B.json"
HUGE_MODEL = EXAMPLES / "models/Qwen3-235B-A22B.json"


def question(folder: Path, cluster: str, model: Path = SMALL_MODEL, batch: int | None = None,
             context_tokens: int | None = None, min_copies: int | None = None) -> PlanQuestion:
    """`cluster`: the content of a cluster file. The quick solver."""
    path = folder / "cluster.yaml"
    path.write_text(cluster)
    return read_question(PlanRequest(model, path, batch, context_tokens, min_copies=min_copies, fast=True))


def answer(folder: Path, cluster: str, model: Path = SMALL_MODEL, batch: int | None = None,
           context_tokens: int | None = None, min_copies: int | None = None) -> PlanAnswer:
    return answer_question(question(folder, cluster, model, batch, context_tokens, min_copies), lambda what: None)
