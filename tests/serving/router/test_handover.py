"""Members leave under open streams: what they have is computed elsewhere before it goes on there."""

from __future__ import annotations

import asyncio

import pytest

from model.step import SamplingSpec
from serving.engine.request import Submission, TokenEvent
from serving.router.handover import way_of
from serving.router.service import InferenceService
from tests.serving.router.served_shards import Shard, Start, ask, collect, counter, epoch_with, token_ids, truth, until

PROMPT = tuple(range(100))


async def leaving_one(service: InferenceService, shards: list[Shard], **params: int) -> asyncio.Task[tuple[int, ...]]:
    """Have the first shard leave with a stream of five tokens on it; the others stand still."""
    others = [f"s{index}" for index in range(1, len(shards))]
    service.set_epoch(epoch_with(service.epoch_number, *shards), leaving=others)
    for shard in shards:
        shard.executor.allow(0)
    shards[0].executor.allow(5)

    async def answer() -> tuple[int, ...]:
        return token_ids(await collect(service, ask(PROMPT, **params)))

    task = asyncio.create_task(answer())
    await until(lambda: [choice.num_tokens for _, choice in service._open.values()] == [5])     # they are at the router
    service.set_epoch(epoch_with(service.epoch_number, *shards), leaving=("s0",))
    return task


async def test_a_stream_goes_over_once_it_is_computed_and_runs_on_until_then(start: Start) -> None:
    service, shards = await start(num_shards=2)
    task = await leaving_one(service, shards, max_tokens=60)
    await until(lambda: shards[1].num_open == 1)            # the warm-up
    shards[0].executor.allow(20)
    await until(lambda: shards[0].executor.num_allowed == 0)
    assert shards[0].num_open == 1
    shards[1].executor.allow(None)
    assert await task == truth(60, prompt=PROMPT).token_ids
    await shards[0].until_empty()
    await shards[1].until_empty()
    assert shards[1].scheduler.num_cached_tokens >= 96      # prompt and journal were not computed twice there
    assert counter(service, 'sequences_moved_total{way="computed"}') == 1
    assert counter(service, 'stream_pause_seconds_count{cause="leaving"}') == 1


async def test_a_warm_up_names_the_member_that_has_the_blocks(start: Start) -> None:
    service, shards = await start(num_shards=2)
    task = await leaving_one(service, shards, max_tokens=10)
    await until(lambda: shards[1].num_open == 1)
    warm_up, = shards[1].scheduler._requests.values()
    assert warm_up.submission.source_shard_id == "s0"
    shards[1].executor.allow(None)
    assert await task == truth(10, prompt=PROMPT).token_ids


@pytest.mark.parametrize(("num_received", "num_cached", "way"), [
    (0, None, "computed"), (0, 48, "computed"), (0, 64, "cached"), (96, 96, "sent"), (32, 96, "cached"),
    (64, 80, "sent"), (112, 100, "sent")])      # what is cached is told of the prompt only
def test_the_way_is_that_of_most_tokens(num_received: int, num_cached: int | None, way: str) -> None:
    sequence = Submission("x", PROMPT, SamplingSpec(), 60, journal_token_ids=tuple(range(20)))
    event = TokenEvent("x", (1,), num_cached_tokens=num_cached, num_received_tokens=num_received)
    assert way_of(event, sequence) == way


async def test_a_stream_that_ends_meanwhile_takes_its_warm_up_along(start: Start) -> None:
    service, shards = await start(num_shards=2)
    task = await leaving_one(service, shards, max_tokens=8)
    await until(lambda: shards[1].num_open == 1)
    shards[0].executor.allow(None)
    assert await task == truth(8, prompt=PROMPT).token_ids
    await until(lambda: shards[1].num_open == 0)
    assert service._handovers._warm_ups == {} and service._links._placed == {}


async def test_a_member_that_dies_before_its_streams_went_over_loses_nothing(start: Start) -> None:
    service, shards = await start(num_shards=2)
    task = await leaving_one(service, shards, max_tokens=60)
    await until(lambda: shards[1].num_open == 1)
    await shards[0].die()
    await until(lambda: shards[1].num_open == 2)
    shards[1].executor.allow(None)
    assert await task == truth(60, prompt=PROMPT).token_ids
    await until(lambda: shards[1].num_open == 0)
    assert counter(service, 'sequences_moved_total{way="computed"}') == 0


async def test_a_warm_up_whose_shard_dies_begins_again_elsewhere(start: Start) -> None:
    service, shards = await start(num_shards=3)
    task = await leaving_one(service, shards, max_tokens=60)
    await until(lambda: shards[1].num_open + shards[2].num_open == 1)
    first = next(shard for shard in shards if shard.num_open and shard is not shards[0])
    await first.die()
    for shard in shards[1:]:
        shard.executor.allow(None)
    assert await task == truth(60, prompt=PROMPT).token_ids
    assert counter(service, 'sequences_moved_total{way="computed"}') == 1


async def test_what_has_no_room_elsewhere_stays(start: Start) -> None:
    service, (large,) = await start()
    small = Shard(num_blocks=10, shard_id="s1")
    await small.start()
    service.set_epoch(epoch_with(2, large, small))
    task = await leaving_one(service, [large, small], max_tokens=200)
    small.executor.allow(None)
    await until(lambda: service._handovers._stay != set())
    large.executor.allow(None)
    assert await task == truth(200, prompt=PROMPT).token_ids
    assert service._handovers._stay == set() and small.scheduler._num_arrived == 0
    await service.close()
    await small.stop()


async def test_a_request_without_a_token_goes_at_once(start: Start) -> None:
    service, shards = await start(num_shards=2)
    for shard in shards:
        shard.executor.allow(0)
    task = asyncio.create_task(collect(service, ask()))
    await until(lambda: sum(shard.num_open for shard in shards) == 1)
    at = next(index for index, shard in enumerate(shards) if shard.num_open)
    service.set_epoch(epoch_with(1, *shards), leaving=(f"s{at}",))
    await until(lambda: shards[1 - at].num_open == 1 and shards[at].num_open == 0)
    shards[1 - at].executor.allow(None)
    assert token_ids(await task) == truth().token_ids
    assert counter(service, 'sequences_moved_total{way="resubmitted"}') == 1
