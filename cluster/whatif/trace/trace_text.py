"""The answer of `moesaic plan --trace` for people, and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.whatif.cluster_file import cluster_name
from cluster.whatif.trace.trace_answer import ATTAINMENT, NamedRun, TraceAnswer, sources
from model.arrays import FloatArray

SHOWN_DECISIONS = 8
_NOTES = ("prompts in the order of arrival, no cached prefixes; changes of the group cost no pause",
          "a replica is paid from the wish for it until it has left; ready_s is assumed where the file has none",
          "Ray Serve's policy never goes below what holds the model here; by itself it would")


def trace_view(answer: TraceAnswer) -> Group:
    return Group(*_parts(answer))


def _parts(answer: TraceAnswer) -> Iterator[RenderableType]:
    question, rules, trace = answer.question, answer.model.rules, answer.trace
    yield Text(f"{question.model_name} in {question.dtype} on {cluster_name(question.cluster)}", style="bold")
    yield Text(f"{len(trace):,} requests in {trace[-1].at_s:,.0f} s; first token within {rules.ttft_slo_s:g} s, each "
               f"further one within {rules.itl_slo_s:g} s; figures: {question.figures}; simulated\n")
    yield _table(answer)
    if answer.part_of_fixed is None:
        yield Text(f"no fixed size serves {ATTAINMENT:.0%} of the requests in time: give the cluster more devices, or "
                   "the requests more time", style="yellow")
    else:
        yield Text(f"the autoscaler takes {answer.part_of_fixed:.2f} of the smallest fixed size that serves "
                   f"{ATTAINMENT:.0%} in time")
    yield Text(f"\n{len(answer.decisions)} decisions" + (", the first:" if answer.decisions else ""))
    for at_s, decision in answer.decisions[:SHOWN_DECISIONS]:
        yield Text("\n".join(f" {at_s:8.1f} s  {change.pool} {change.before} -> {change.after}: {change.why}"
                             for change in decision.changes))
    yield Text("\n" + "\n".join(f" * {note}" for note in (*sources(question), *_NOTES)))


def _table(answer: TraceAnswer) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(("replicas", "in time", "replica-s", "cost", "first token p50", "p99", "token p99")):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for one in (answer.ours, *answer.stock, *answer.fixed):
        ttft, itl = _times(one)
        table.add_row(one.name, f"{one.attained:.1%}", f"{one.run.replica_seconds:,.0f}", f"{one.run.cost:,.2f}",
                      f"{ttft[0]:.2f} s", f"{ttft[1]:.2f} s", f"{itl[1]:.3f} s")
    return table


def _times(one: NamedRun) -> tuple[FloatArray, FloatArray]:
    """Return p50 and p99 of the time to the first token, and of the time of each further one."""
    def of(values: list[float]) -> FloatArray:
        return np.percentile(values, (50, 99), method="higher")
    return of([served.ttft_s for served in one.run.served]), of([served.itl_s for served in one.run.served])


def trace_json(answer: TraceAnswer) -> str:
    """Return one JSON object."""
    def content(one: NamedRun) -> dict[str, object]:
        ttft, itl = _times(one)
        return {"name": one.name, "attained": one.attained, "replica_seconds": one.run.replica_seconds,
                "cost": one.run.cost, "ttft_p50_s": ttft[0], "ttft_p99_s": ttft[1], "itl_p99_s": itl[1]}
    rules = answer.model.rules
    return json.dumps({
        "model": answer.question.model_name, "figures": answer.question.figures, "requests": len(answer.trace),
        "ttft_slo_s": rules.ttft_slo_s, "itl_slo_s": rules.itl_slo_s, "autoscaler": content(answer.ours),
        "stock": [content(one) for one in answer.stock], "fixed": [content(one) for one in answer.fixed],
        "part_of_fixed": answer.part_of_fixed,
        "decisions": [{"at_s": at_s, "wanted": decision.wanted, "why": decision.changes[0].why}
                      for at_s, decision in answer.decisions]})
