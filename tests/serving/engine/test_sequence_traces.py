"""The phases of a sequence, with the steps and exchanges of each."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from model.step import SamplingSpec, ScheduledRequest, StepPlan, StepResult, StepStats, StepWork
from serving.engine.request import Submission, TokenEvent
from serving.engine.sequence_traces import SequenceTraces

WORK = StepWork(own_s=(0.1, 0.2), planning_s=(0.05,), experts_s=(0.15,))     # 0.5 s


@dataclass
class Sink:
    spans: list[tuple[str, str, float, float, dict[str, str | int | float]]] = field(default_factory=list)

    def add(self, name: str, traceparent: str, began_s: float, ended_s: float,
            attributes: dict[str, str | int | float]) -> None:
        self.spans.append((name, traceparent, began_s, ended_s, attributes))


@dataclass
class World:
    """Steps of two seconds each, of which half a second is work."""

    sink: Sink = field(default_factory=Sink)
    now_s: float = 10.0

    def __post_init__(self) -> None:
        self.traces = SequenceTraces(self.sink, lambda: self.now_s)

    def step(self, *request_ids: str, work: StepWork | None = WORK) -> None:
        began_s, self.now_s = self.now_s, self.now_s + 2.0
        plan = StepPlan(1, 0, tuple(ScheduledRequest(request_id, (1,), 0, ()) for request_id in request_ids))
        self.traces.stepped(plan, StepResult(1, 0, (), StepStats(work=work)), began_s)


@pytest.fixture
def world() -> World:
    return World()


def submission(request_id: str, traceparent: str = "parent") -> Submission:
    return Submission(request_id, (5, 6, 7), SamplingSpec(), 4, journal_token_ids=(8,), traceparent=traceparent)


def test_a_sequence_waits_is_prefilled_and_decoded(world: World) -> None:
    world.traces.begin(submission("a"))
    world.now_s = 11.0
    world.step("a", "untraced")
    world.step("a")
    world.traces.add(TokenEvent("a", (1,), num_cached_tokens=2))
    world.step("a")
    world.traces.add(TokenEvent("a", (2,)))
    world.traces.end("a", "stop")
    of_a = {"moesaic.sequence_id": "a"}
    assert world.sink.spans == [
        ("wait", "parent", 10.0, 11.0, of_a),
        ("prefill", "parent", 11.0, 15.0, of_a | {
            "moesaic.num_steps": 2, "moesaic.step_seconds": 4.0, "moesaic.exchange_seconds": pytest.approx(3.0),
            "gen_ai.usage.input_tokens": 3, "gen_ai.usage.cache_read.input_tokens": 2, "moesaic.journal_tokens": 1,
            "gen_ai.usage.output_tokens": 1}),
        ("decode", "parent", 15.0, 17.0, of_a | {
            "moesaic.num_steps": 1, "moesaic.step_seconds": 2.0, "moesaic.exchange_seconds": pytest.approx(1.5),
            "gen_ai.usage.output_tokens": 1, "moesaic.outcome": "stop"})]


def test_steps_that_are_not_timed_say_nothing_of_exchanges(world: World) -> None:
    world.traces.begin(submission("a"))
    world.step("a", work=None)
    world.traces.end("a", "failed")
    assert "moesaic.exchange_seconds" not in world.sink.spans[-1][4]


def test_one_that_never_ran_has_waited(world: World) -> None:
    world.traces.begin(submission("a"))
    world.traces.end("a", "cancelled")
    world.traces.end("a", "cancelled")
    assert [span[0] for span in world.sink.spans] == ["wait"]


def test_one_that_ends_with_its_first_token_has_no_decode(world: World) -> None:
    world.traces.begin(submission("a"))
    world.step("a")
    world.traces.add(TokenEvent("a", (1,)))
    world.traces.end("a", "length")
    assert [span[0] for span in world.sink.spans] == ["wait", "prefill"]


def test_nothing_is_kept_of_what_nobody_traces(world: World) -> None:
    for traces in (world.traces, SequenceTraces(None, lambda: 0.0)):
        traces.begin(submission("a", traceparent="" if traces is world.traces else "parent"))
        traces.add(TokenEvent("a", (1,)))
        traces.end("a", "stop")
        assert not traces._open
    assert not world.sink.spans
