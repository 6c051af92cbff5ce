"""The contract between scheduler and runner survives the wire, and its defaults do nothing."""

from __future__ import annotations

import dataclasses

import pytest

from model.step import SamplingSpec, ScheduledRequest, StepHeader, StepPlan


@pytest.mark.parametrize("header", [StepHeader(1, 2, 3), StepHeader(2**40, 0, 0, 7)])
def test_a_header_is_the_same_behind_the_collective(header: StepHeader) -> None:
    assert StepHeader.from_ints(header.to_ints()) == header
    assert len(header.to_ints()) == len(dataclasses.fields(header))


@pytest.mark.parametrize(("fields", "needs"), [
    ({}, False), ({"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}, False),
    ({"presence_penalty": 0.1}, True), ({"frequency_penalty": -0.1}, True), ({"repetition_penalty": 1.1}, True)])
def test_only_penalties_need_the_tokens_before(fields: dict[str, float], needs: bool) -> None:
    assert SamplingSpec(**fields).needs_history is needs        # type: ignore[arg-type]


def test_a_plan_counts_its_tokens_and_cannot_be_changed() -> None:
    plan = StepPlan(1, 2, (ScheduledRequest("a", (1, 2, 3), 0, (0,)), ScheduledRequest("b", (4,), 9, (1,))))
    assert plan.num_tokens == 4 and StepPlan(1, 2, ()).num_tokens == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.step_index = 3     # type: ignore[misc]
