"""`moesaic plan --trace` on a small cluster: text, JSON, page and picture tell the same."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from cluster.planner.layer.error import PlacementError
from tests.cluster.whatif.plan_questions import MANY_EXPERTS, question
from tests.cluster.whatif.trace.simulated import burst

with warnings.catch_warnings():
    warnings.simplefilter("ignore")         # Ray's own, at import
    from cluster.whatif.trace.trace_answer import TraceAnswer, answer_trace, fleet_model
    from cluster.whatif.trace.trace_page import trace_page
    from cluster.whatif.trace.trace_pictures import trace_png
    from cluster.whatif.trace.trace_text import trace_json, trace_view

NODES = "nodes: [{name: h100, device: h100-sxm, devices: %d, cost_per_hour: 3, ready_s: 2}]"


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> TraceAnswer:
    said: list[str] = []
    trace = tuple(burst(60, 0.0, 1500) + burst(60, 200.0, 1500))
    asked = question(tmp_path_factory.mktemp("trace"), NODES % 4, MANY_EXPERTS)
    found = answer_trace(asked, trace, said.append)
    assert said[:2] == ["the autoscaler", "Ray Serve's policy"] and said[-1].endswith("replicas all the time")
    return found


def test_the_smallest_size_that_serves_in_time_is_found(answer: TraceAnswer) -> None:
    assert answer.smallest is not None and answer.smallest.attained >= 0.99
    smaller = [one for one in answer.fixed if one.run.replica_seconds < answer.smallest.run.replica_seconds]
    assert all(one.attained < 0.99 for one in smaller)
    assert answer.part_of_fixed == pytest.approx(answer.ours.run.replica_seconds
                                                 / answer.smallest.run.replica_seconds)


def test_text_and_json_tell_the_same(answer: TraceAnswer) -> None:
    content = json.loads(trace_json(answer))
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with console.capture() as captured:
        console.print(trace_view(answer), highlight=False)
    text = captured.get()
    assert f"{content['autoscaler']['attained']:.1%}" in text and "120 requests in 201 s" in text
    assert f"takes {content['part_of_fixed']:.2f} of the smallest fixed size" in text
    assert content["decisions"][0]["why"] in " ".join(text.split())
    assert {one["name"] for one in content["stock"]} == {"Ray Serve", "Ray Serve, quick"}


def test_page_and_picture_need_no_other_file(answer: TraceAnswer) -> None:
    assert trace_png(answer).startswith(b"\x89PNG")
    page = trace_page(answer)
    assert "data:image/png;base64," in page and "Ray Serve, quick" in page and "src=\"http" not in page


def test_pools_are_as_the_cluster_file_says(tmp_path: Path) -> None:
    pool = fleet_model(question(tmp_path, NODES % 4, MANY_EXPERTS)).pools[0]
    assert (pool.name, pool.most, pool.ready_s, pool.cost_per_hour) == ("h100", 4, 2.0, 3.0)
    assumed = fleet_model(question(tmp_path, (NODES % 4).replace(", ready_s: 2", ""), MANY_EXPERTS)).pools[0]
    assert assumed.ready_s == pytest.approx(20 + 61.06e9 / 2e9, rel=0.01)


def test_devices_that_cannot_hold_the_model_are_refused(tmp_path: Path) -> None:
    small = (NODES % 1).replace("ready_s: 2", "memory_budget: 9GB")
    with pytest.raises(PlacementError, match="do not hold the model"):
        answer_trace(question(tmp_path, small, MANY_EXPERTS), tuple(burst(2, 0.0)), lambda what: None)
