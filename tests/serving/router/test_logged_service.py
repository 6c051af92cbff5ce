"""One line for each request, however it ends, without what it says."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from serving.engine.request import FinishReason
from serving.errors import OverloadedError
from serving.router.generation import GenerationDelta, GenerationRequest, ModelCard
from serving.router.logged_service import LoggedService
from serving.sampling_params import SamplingParams

REQUESTS = [GenerationRequest(f"r{index}", "m", (901, 902, 903), SamplingParams()) for index in range(2)]


class Answers:
    """Says two tokens for each prompt; `error` instead of the last."""

    def __init__(self, error: Exception | None = None) -> None:
        self.cards = (ModelCard("m", 100, 0),)
        self.error = error

    def is_ready(self) -> bool:
        return True

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, GenerationDelta]]:
        for index, _ in enumerate(requests):
            yield index, GenerationDelta(0, "secret", (7,), num_cached_tokens=2)
            if self.error:
                raise self.error
            yield index, GenerationDelta(0, "secret", (8,), finish_reason=FinishReason.STOP)


def service_with(answers: Answers) -> LoggedService:
    times_s = iter(range(100))
    return LoggedService(answers, lambda: float(next(times_s)))


def line_of(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = caplog.records
    text = record.getMessage()
    assert "secret" not in text and "901" not in text
    return text


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serving.router.logged_service")


async def test_a_request_that_finishes_says_how_long_and_how_much(caplog: pytest.LogCaptureFixture) -> None:
    service = service_with(Answers())
    assert service.is_ready() and service.cards[0].name == "m"
    assert len([item async for item in service.generate(REQUESTS)]) == 4
    assert line_of(caplog) == (
        "request_ended request_id=r0 tenant=default model=m outcome=finished num_parts=2 num_prompt_tokens=6 "
        "num_cached_tokens=4 num_output_tokens=4 first_token_s=1.0 took_s=5.000")


@pytest.mark.parametrize(("num_read", "outcome"), [(1, "cancelled"), (4, "finished")])
async def test_one_that_is_not_read_to_its_end_was_cancelled_unless_nothing_was_left(
        num_read: int, outcome: str, caplog: pytest.LogCaptureFixture) -> None:
    async with aclosing(service_with(Answers()).generate(REQUESTS)) as deltas:
        for _ in range(num_read):
            await anext(deltas)
    assert f" outcome={outcome} " in line_of(caplog)


async def test_an_error_is_named_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OverloadedError):
        async for _ in service_with(Answers(OverloadedError("full", retry_after_s=1.0))).generate(REQUESTS):
            pass
    assert " outcome=OverloadedError " in line_of(caplog) and "num_output_tokens=1" in line_of(caplog)
