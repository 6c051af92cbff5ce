"""Spans of the sequences of one shard: how long each waited, was prefilled and decoded, and how much of that went to
exchanges with the other members. Costs nothing where no request is traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from model.step import StepPlan, StepResult
from serving.engine.request import Submission, TokenEvent


class SpanSink(Protocol):
    """Takes spans that have ended: the part of `serving.tracing.tracer.Tracer` that a shard needs."""

    def add(self, name: str, traceparent: str, began_s: float, ended_s: float,
            attributes: dict[str, str | int | float]) -> None: ...


@dataclass(slots=True)
class _Phase:
    """Is the present phase of a sequence: it waits until its first step, is prefilled up to its first token."""

    name: str
    began_s: float
    num_steps: int = 0
    num_tokens: int = 0             # generated
    num_cached_tokens: int | None = None
    exchange_s: float | None = None     # None: steps are not timed
    step_s: float = 0.0


@dataclass(slots=True)
class _Sequence:
    traceparent: str
    num_prompt_tokens: int
    num_journal_tokens: int
    phase: _Phase = field(default_factory=lambda: _Phase("wait", 0.0))


class SequenceTraces:
    """Follows the traced sequences of an engine, from `begin` to `end`. `sink` None: there are none."""

    def __init__(self, sink: SpanSink | None, clock: Callable[[], float]) -> None:
        self._sink = sink
        self._clock = clock
        self._open: dict[str, _Sequence] = {}

    def begin(self, submission: Submission) -> None:
        if self._sink is not None and submission.traceparent:
            self._open[submission.request_id] = _Sequence(
                submission.traceparent, len(submission.prompt_token_ids), len(submission.journal_token_ids),
                _Phase("wait", self._clock()))

    def stepped(self, plan: StepPlan, result: StepResult, began_s: float) -> None:
        """Count a step that has just ended for those that took part in it."""
        if not self._open:
            return
        step_s, work = self._clock() - began_s, result.stats.work
        for scheduled in plan.requests:
            if (sequence := self._open.get(scheduled.request_id)) is None:
                continue
            if sequence.phase.name == "wait":
                self._enter(scheduled.request_id, sequence, "prefill", began_s)
            phase = sequence.phase
            phase.num_steps += 1
            phase.step_s += step_s
            if work is not None:
                phase.exchange_s = (phase.exchange_s or 0.0) + max(0.0, step_s - work.total_s)

    def add(self, event: TokenEvent) -> None:
        """Count the tokens of a step; the first ones end the prefill."""
        sequence = self._open.get(event.request_id)
        if sequence is None or not event.token_ids:
            return
        if event.num_cached_tokens is not None:
            sequence.phase.num_cached_tokens = event.num_cached_tokens
        sequence.phase.num_tokens += len(event.token_ids)
        if sequence.phase.name == "prefill":
            self._enter(event.request_id, sequence, "decode", self._clock())

    def end(self, request_id: str, outcome: str) -> None:
        """End the sequence's last phase; does nothing for one that is not traced."""
        sequence = self._open.pop(request_id, None)
        if sequence is not None and (sequence.phase.name != "decode" or sequence.phase.num_steps):
            self._send(request_id, sequence, self._clock(), {"moesaic.outcome": outcome})

    def _enter(self, request_id: str, sequence: _Sequence, name: str, at_s: float) -> None:
        self._send(request_id, sequence, at_s, {})
        sequence.phase = _Phase(name, at_s)

    def _send(self, request_id: str, sequence: _Sequence, ended_s: float, more: dict[str, str | int | float]) -> None:
        phase = sequence.phase
        attributes: dict[str, str | int | float] = {"moesaic.sequence_id": request_id, **more}
        if phase.name != "wait":
            attributes |= {"moesaic.num_steps": phase.num_steps, "moesaic.step_seconds": phase.step_s,
                           "gen_ai.usage.output_tokens": phase.num_tokens}
        if phase.name == "prefill":
            attributes |= {"gen_ai.usage.input_tokens": sequence.num_prompt_tokens,
                           "moesaic.journal_tokens": sequence.num_journal_tokens}
        if phase.num_cached_tokens is not None:
            attributes["gen_ai.usage.cache_read.input_tokens"] = phase.num_cached_tokens
        if phase.exchange_s is not None:
            attributes["moesaic.exchange_seconds"] = phase.exchange_s
        assert self._sink is not None, "nothing is open without it"
        self._sink.add(phase.name, sequence.traceparent, phase.began_s, ended_s, attributes)
