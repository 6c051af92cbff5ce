"""What became of a request, however its reading ends."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from serving.engine.request import FinishReason
from serving.errors import OverloadedError
from serving.router.generation import GenerationDelta, GenerationRequest
from serving.router.request_tally import RequestTally
from serving.sampling_params import SamplingParams

REQUESTS = [GenerationRequest("r", "m", (1, 2, 3), SamplingParams(n=2))]
LAST = GenerationDelta(0, "a", (7, 8), num_cached_tokens=2, finish_reason=FinishReason.STOP)


def tally_of(deltas: list[GenerationDelta], error: BaseException | None = None) -> RequestTally:
    times_s = iter(range(100))
    tally = RequestTally(REQUESTS, lambda: float(next(times_s)))
    with suppress(BaseException), tally:
        for delta in deltas:
            tally.add(delta)
        if error is not None:
            raise error
    return tally


def test_it_adds_up_what_was_got() -> None:
    tally = tally_of([GenerationDelta(1, "half"), LAST, LAST])
    assert (tally.num_prompt_tokens, tally.num_output_tokens, tally.num_cached_tokens) == (3, 4, 4)
    assert tally.first_token_s == 2.0 and tally.took_s == 4.0 and tally.finish_reasons == ["stop", "stop"]


@pytest.mark.parametrize(("deltas", "error", "outcome"), [
    ([LAST, LAST], None, "finished"), ([LAST, LAST], GeneratorExit(), "finished"),
    ([LAST], GeneratorExit(), "cancelled"), ([LAST], asyncio.CancelledError(), "cancelled"),
    ([], OverloadedError("full", retry_after_s=1.0), "OverloadedError"), ([], KeyboardInterrupt(), "failed")])
def test_it_says_what_became_of_it(deltas: list[GenerationDelta], error: BaseException | None, outcome: str) -> None:
    assert tally_of(deltas, error).outcome == outcome
