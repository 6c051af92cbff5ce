"""Several streams as one: nothing lost, nothing left running."""

from __future__ import annotations

import asyncio

import pytest

from serving.engine.request import FinishReason
from serving.errors import ClientGoneError, ShardFailedError
from serving.ingress.collect import CollectedChoice, UsageCount, open_stream
from serving.router.generation import GenerationDelta, GenerationRequest
from serving.sampling_params import SamplingParams
from tests.deadlines import PATIENCE_S
from tests.serving.ingress.conftest import FakeService


def requests(number: int) -> list[GenerationRequest]:
    params = SamplingParams(temperature=0)
    return [GenerationRequest(f"r{index}", "tiny", (5,) * (index + 1), params) for index in range(number)]


@pytest.mark.parametrize("number", [1, 3])
async def test_every_delta_arrives_once(service: FakeService, number: int) -> None:
    asked = requests(number)
    usage = UsageCount(asked)
    choices = [CollectedChoice() for _ in asked]
    async with open_stream(service, asked) as deltas:
        async for index, delta in deltas:
            usage.add(index, delta)
            choices[index].add(delta)
    assert len({choice.text for choice in choices}) == 1 and all(choice.finish_reason for choice in choices)
    assert usage.num_prompt_tokens == sum(range(number + 1)) and usage.num_cached_tokens == 3 * number
    assert usage.num_generated_tokens == sum(len(choice.token_ids) for choice in choices)
    assert service.num_closed == number


@pytest.mark.parametrize("number", [1, 3])
async def test_leaving_early_closes_every_stream(service: FakeService, number: int) -> None:
    service.stalls = True
    async with asyncio.timeout(PATIENCE_S):
        async with open_stream(service, requests(number)) as deltas:
            await anext(aiter(deltas))
    assert service.num_closed == len(service.requests) == number


@pytest.mark.parametrize(("reason", "error"), [(FinishReason.FAILED, ShardFailedError),
                                               (FinishReason.CANCELLED, ClientGoneError)])
async def test_a_choice_that_did_not_finish_is_an_error(service: FakeService, monkeypatch: pytest.MonkeyPatch,
                                                        reason: FinishReason, error: type[Exception]) -> None:
    monkeypatch.setattr(service, "_deltas", lambda request: [GenerationDelta(0, finish_reason=reason)])
    with pytest.raises(error):
        async with open_stream(service, requests(1)) as deltas:
            await anext(aiter(deltas))


def test_a_collected_choice_is_one_delta_again() -> None:
    choice = CollectedChoice()
    choice.add(GenerationDelta(1, "a", (1,)))
    choice.add(GenerationDelta(1, "b", (2, 3), finish_reason=FinishReason.STOP, stop_reason="x"))
    assert choice.to_delta(1) == GenerationDelta(1, "ab", (1, 2, 3), finish_reason=FinishReason.STOP, stop_reason="x")
