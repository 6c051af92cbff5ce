"""A key's request is counted once, with what it has used, however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from serving.engine.request import FinishReason
from serving.errors import ForbiddenError, InvalidRequestError, QuotaExceededError, ShardFailedError
from serving.metrics import RouterMetrics
from serving.router.generation import GenerationDelta, GenerationRequest, ModelCard
from serving.router.metered_service import MeteredService, ask_of
from serving.sampling_params import SamplingParams
from serving.tenants.access import Access
from serving.tenants.database import reading
from serving.tenants.key import Key, Limits, Tenant
from serving.tenants.schema import REQUESTS
from serving.tenants.standing import Ask
from tests.serving.tenants.keys import new_key

STOP = FinishReason.STOP


class Answers:
    """Says two tokens and then one for each prompt; `error` instead of the end."""

    def __init__(self, error: Exception | None = None) -> None:
        self.cards = (ModelCard("m", 100, 0),)
        self.error = error
        self.asked: list[GenerationRequest] = []

    def is_ready(self) -> bool:
        return True

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, GenerationDelta]]:
        self.asked = list(requests)
        for index in range(len(requests)):
            yield index, GenerationDelta(0, "ab", (1, 2), num_cached_tokens=3)
        if self.error:
            raise self.error
        for index in range(len(requests)):
            yield index, GenerationDelta(0, "c", (3,), finish_reason=STOP)


def ask(key: Key | None, num_prompt: int = 5, **params: object) -> GenerationRequest:
    return GenerationRequest("r", "m", tuple(range(num_prompt)), SamplingParams.model_validate(params),
                             Tenant("team", key))


class Metered:
    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.answers = Answers(error)
        self.access = Access(f"sqlite:///{folder}/tenants.db", "router", 90)
        self.metrics = RouterMetrics()
        self.service = MeteredService(self.answers, self.access.meter, lambda: 1.8e9, self.metrics.tenants)

    async def __aenter__(self) -> Metered:
        self.running = asyncio.create_task(self.access.run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)

        async def nothing() -> None:
            pass
        await self.access.close_after(nothing())

    async def rows(self) -> list[tuple[object, ...]]:
        await self.access.meter.write()
        columns = REQUESTS.c
        with reading(self.access.engine) as connection:
            return [tuple(row) for row in connection.execute(select(
                columns.outcome, columns.num_prompt, columns.num_cached, columns.num_generated, columns.num_held))]


async def collect(service: MeteredService, *requests: GenerationRequest) -> int:
    async with aclosing(service.generate(requests)) as deltas:
        return len([delta async for delta in deltas])


async def test_each_end_is_counted_as_what_it_is(tmp_path: Path) -> None:
    async with Metered(tmp_path) as metered:
        key, _ = new_key()
        assert await collect(metered.service, ask(key), ask(key, 7)) == 4
        assert await metered.rows() == [("finished", 12, 6, 6, 18)]
        shown = metered.metrics.render()[0].decode()
        assert 'moesaic:tenant_tokens_total{kind="generated",tenant="team"} 6.0' in shown
        assert 'moesaic:tenant_requests_total{outcome="finished",tenant="team"} 1.0' in shown
    async with Metered(tmp_path, ShardFailedError("gone")) as metered:
        with pytest.raises(ShardFailedError):
            await collect(metered.service, ask(key))
        assert (await metered.rows())[1:] == [("failed", 5, 3, 2, 7)]
    async with Metered(tmp_path) as metered:
        async with aclosing(metered.service.generate([ask(key)])) as deltas:
            await anext(deltas)
        async with aclosing(metered.service.generate([ask(key)])) as deltas:
            while (await anext(deltas))[1].finish_reason is None:
                pass
        assert (await metered.rows())[2:] == [("cancelled", 5, 3, 2, 7), ("finished", 5, 3, 3, 8)]


async def test_without_a_key_nothing_is_counted(tmp_path: Path) -> None:
    async with Metered(tmp_path) as metered:
        assert await collect(metered.service, ask(None)) == 2 and await metered.rows() == []
        assert metered.service.is_ready() and metered.service.cards == metered.answers.cards


async def test_what_a_key_does_not_allow_is_refused_before_it_costs_anything(tmp_path: Path) -> None:
    async with Metered(tmp_path) as metered:
        with pytest.raises(ForbiddenError, match="not for the model 'm'"):
            await collect(metered.service, ask(new_key(models=frozenset({"other"}))[0]))
        short, _ = new_key(limits=Limits(max_tokens=4))
        with pytest.raises(InvalidRequestError, match="max_tokens=5"):
            await collect(metered.service, ask(short, max_tokens=5))
        poor, _ = new_key(limits=Limits(tokens_per_day=20))
        with pytest.raises(QuotaExceededError, match="tokens_per_day=20"):
            await asyncio.gather(*(collect(metered.service, ask(poor, max_tokens=6)) for _ in range(2)))
        assert 'tenant_refused_total{error="QuotaExceededError",tenant="team"} 1.0' in \
            metered.metrics.render()[0].decode()
        assert len(await metered.rows()) == 1


async def test_who_sets_no_maximum_gets_that_of_the_key_and_of_the_budget(tmp_path: Path) -> None:
    async with Metered(tmp_path) as metered:
        await collect(metered.service, ask(new_key(limits=Limits(max_tokens=4))[0]))
        assert metered.answers.asked[0].params.max_tokens == 4
        await collect(metered.service, ask(new_key(limits=Limits(tokens_per_day=20))[0], n=2), )
        assert metered.answers.asked[0].params.max_tokens == 7
        await collect(metered.service, ask(new_key(limits=Limits(tokens_per_day=2000))[0]))
        assert metered.answers.asked[0].params.max_tokens is None


async def test_a_key_bounds_how_urgent_its_requests_are(tmp_path: Path) -> None:
    async with Metered(tmp_path) as metered:
        for of_key, asked, given in ((0, None, 0), (0, 7, 7), (3, None, 3), (3, 3, 3), (-5, None, 0), (-5, -5, -5)):
            key = replace(new_key()[0], priority=of_key)
            await collect(metered.service, replace(ask(key), priority=asked))
            assert metered.answers.asked[0].priority == given, (of_key, asked)
        with pytest.raises(ForbiddenError, match="priority=-1 is more urgent.*ask for 0 or more") as refused:
            await collect(metered.service, replace(ask(new_key()[0]), priority=-1))
        assert refused.value.param == "priority"


def test_what_a_request_may_use() -> None:
    assert ask_of([ask(None, max_tokens=7, n=2)], 100) == Ask(19, 19, 19)
    assert ask_of([ask(None)], 5000) == Ask(6, 5000, 5 + 1024)
    assert ask_of([ask(None, 200)], 100) == Ask(201, 201, 201)
