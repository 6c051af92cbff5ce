"""Requests that nobody waits for have more time, and are else what they were."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from serving.priority import MAX_PRIORITY
from serving.router.generation import GenerationDelta, GenerationRequest, ModelCard
from serving.router.patient_service import DEADLINE_S, PatientService
from serving.sampling_params import SamplingParams


class Answers:
    def __init__(self) -> None:
        self.cards = (ModelCard("m", 100, 0),)
        self.asked: list[GenerationRequest] = []
        self.is_closed = False

    def is_ready(self) -> bool:
        return True

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, GenerationDelta]]:
        self.asked += requests
        try:
            yield 0, GenerationDelta(0, "a")
            yield 0, GenerationDelta(0, "b")
        finally:
            self.is_closed = True


async def test_they_have_time_and_end_with_who_asks() -> None:
    answers = Answers()
    service = PatientService(answers)
    assert service.cards == answers.cards and service.is_ready()
    deltas = service.generate([GenerationRequest("r", "m", (1,), SamplingParams())])
    assert (await anext(deltas))[1].text == "a"
    assert (answers.asked[0].deadline_s, answers.asked[0].priority) == (DEADLINE_S, MAX_PRIORITY)
    await deltas.aclose()
    assert answers.is_closed
