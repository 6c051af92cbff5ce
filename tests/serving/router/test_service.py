"""The service over real links to real engines; only the model is fake, and a function of what the KV cache holds."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from serving.config import RouterConfig
from serving.engine.request import FinishReason
from serving.errors import (
    ContextLengthError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
    ServingError,
)
from serving.link import server as link_server
from serving.metrics import RouterMetrics
from serving.router.generation import GenerationRequest, ModelCard
from serving.router.service import InferenceService
from serving.sampling_params import SamplingParams
from serving.tenants.key import Tenant
from serving.text.tokenizer import Tokenizer
from tests.serving.engine.fake_group import prompt_logprob
from tests.serving.link.fake_link import clock
from tests.serving.router.served_shards import (
    PROMPT,
    SCHEDULER,
    Start,
    ask,
    collect,
    counter,
    epoch_with,
    text,
    token_ids,
    truth,
    until,
)


async def test_a_request_streams_its_tokens_and_their_text(start: Start, tokenizer: Tokenizer) -> None:
    service, (shard,) = await start()
    deltas = await collect(service, ask(logprobs=0))
    want = truth()
    assert token_ids(deltas) == want.token_ids
    assert text(deltas) == tokenizer.decode(want.token_ids)
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.LENGTH]
    assert [entry.token_id for delta in deltas for entry in delta.logprobs] == list(want.token_ids)
    assert deltas[0].num_cached_tokens == 0
    await shard.until_empty()
    assert service._admission.num_open == 0 and len(service._journal) == 0


@pytest.mark.parametrize(("num_prompts", "n"), [(60, 1), (16, 4)])
async def test_parts_of_one_request_are_no_load_on_it(start: Start, num_prompts: int, n: int) -> None:
    """They are fifteen times what may be open and twenty times what may wait."""
    service, (shard,) = await start(max_open_requests=4, max_queued_requests=3)
    requests = [ask(PROMPT[:5 + i % 10], seed=i, n=n, max_tokens=3) for i in range(num_prompts)]
    tokens: dict[tuple[int, int], tuple[int, ...]] = {}
    async for index, delta in service.generate(requests):
        tokens[index, delta.choice] = tokens.get((index, delta.choice), ()) + delta.token_ids
        assert shard.num_open <= 4
    for i, request in enumerate(requests):
        for choice in range(n):
            assert tokens[i, choice] == truth(3, seed=i + choice, prompt=request.prompt_token_ids).token_ids
    await shard.until_empty()
    assert service._admission.num_open == service._admission.num_queued == 0


async def test_others_take_turns_with_the_parts_of_a_request(start: Start) -> None:
    service, (shard,) = await start(max_open_requests=2, max_queued_requests=2)
    shard.executor.allow(0)
    order: list[str] = []

    async def run(name: str, num_parts: int) -> None:
        async for _, delta in service.generate([ask(max_tokens=2) for _ in range(num_parts)]):
            order.extend([name] if delta.finish_reason else [])

    large = asyncio.create_task(run("large", 20))
    await until(lambda: service._admission.num_open == 2)
    small = asyncio.create_task(run("small", 1))
    await until(lambda: service._admission.num_queued == 2)     # one part of the large one, and the small one
    with pytest.raises(OverloadedError):
        await run("refused", 1)
    shard.executor.allow(None)
    await asyncio.gather(large, small)
    assert order.count("large") == 20 and order.index("small") <= 4


async def test_a_part_that_fails_ends_the_request(start: Start) -> None:
    service, (shard,) = await start(max_open_requests=2)
    wide = ask()
    wide = replace(wide, params=wide.params.model_copy(update={"top_k": 2**32}))
    with pytest.raises(InvalidRequestError, match="cannot be sent to a shard"):
        async for _ in service.generate([ask(max_tokens=1000), wide, ask(), ask()]):
            pass
    await shard.until_empty()
    assert service._admission.num_open == service._admission.num_queued == 0 and len(service._journal) == 0


async def test_leaving_a_request_of_many_parts_leaves_nothing(start: Start) -> None:
    service, (shard,) = await start(max_open_requests=2)
    stream = service.generate([ask(max_tokens=1000) for _ in range(10)])
    await anext(stream)
    await stream.aclose()
    await shard.until_empty()
    assert service._admission.num_open == service._admission.num_queued == 0 and len(service._journal) == 0


async def test_whatever_ends_the_start_of_parts_ends_the_request(start: Start) -> None:
    service, (shard,) = await start(max_open_requests=1)
    shard.executor.allow(0)
    stream = service.generate([ask(), ask()])
    reading = asyncio.ensure_future(anext(stream))
    assert service.has_room()
    await until(lambda: service._admission.num_queued == 1)
    assert not service.has_room()
    part, _ = next(iter(service._open.values()))
    assert part.whole.starter is not None
    part.whole.starter.cancel()
    with pytest.raises(NotReadyError, match="the request was stopped"):
        await reading
    shard.executor.allow(None)
    await shard.until_empty()


async def test_the_deadline_is_of_the_request_and_not_of_its_parts(start: Start) -> None:
    service, (shard,) = await start(max_open_requests=1)
    shard.executor.allow(2)
    with pytest.raises(DeadlineExceededError):
        async for _ in service.generate([ask(deadline_s=0.2) for _ in range(5)]):
            pass
    await shard.until_empty()
    assert service._admission.num_open == service._admission.num_queued == 0


async def test_choices_have_seeds_of_their_own(start: Start) -> None:
    service, _ = await start()
    deltas = await collect(service, ask(n=3))
    assert [token_ids(deltas, choice) for choice in range(3)] == [truth(seed=7 + i).token_ids for i in range(3)]
    assert sorted(delta.choice for delta in deltas if delta.finish_reason) == [0, 1, 2]


async def test_many_requests_at_once_on_several_shards_all_come_out_right(start: Start) -> None:
    service, shards = await start(num_shards=3)
    prompts = [tuple(range(i, i + 5 + 3 * i)) for i in range(24)]
    answers = await asyncio.gather(*(collect(service, ask(prompt, seed=i, max_tokens=5 + i))
                                     for i, prompt in enumerate(prompts)))
    for i, (prompt, deltas) in enumerate(zip(prompts, answers, strict=True)):
        assert token_ids(deltas) == truth(5 + i, seed=i, prompt=prompt).token_ids
    assert all(shard.engine.num_tokens_computed for shard in shards)


async def test_a_drawn_seed_differs_between_requests(start: Start) -> None:
    service, _ = await start()
    assert token_ids(await collect(service, ask(seed=None))) != token_ids(await collect(service, ask(seed=None)))


@pytest.mark.parametrize("includes_stop", [False, True])
async def test_a_stop_string_cuts_text_tokens_and_logprobs_exactly(start: Start, tokenizer: Tokenizer,
                                                                   includes_stop: bool) -> None:
    service, (shard,) = await start()
    want = truth(max_tokens=1000).token_ids
    whole = tokenizer.decode(want)
    stop = whole[40:43]                         # straddles tokens: each of these is a byte
    at = whole.index(stop)
    deltas = await collect(service, ask(max_tokens=1000, stop=(stop,), logprobs=0,
                                        include_stop_str_in_output=includes_stop))
    assert text(deltas) == whole[:at + len(stop) * includes_stop]
    kept = token_ids(deltas)
    assert kept == want[:len(kept)] and tokenizer.decode(kept) == whole[:at + len(stop)]
    assert sum(len(delta.logprobs) for delta in deltas) == len(kept)
    assert deltas[-1].finish_reason is FinishReason.STOP and deltas[-1].stop_reason == stop
    await shard.until_empty()                   # the shard was told
    assert shard.engine.num_tokens_computed < 1000


async def test_a_stop_token_is_counted_but_not_shown(start: Start, tokenizer: Tokenizer) -> None:
    service, _ = await start()
    want = truth(max_tokens=100).token_ids
    stop_id = next(token_id for token_id in want[5:] if token_id not in want[:5] and token_id > 2)
    at = want.index(stop_id)
    deltas = await collect(service, ask(max_tokens=100, stop_token_ids=(stop_id,)))
    assert token_ids(deltas) == want[:at + 1] and text(deltas) == tokenizer.decode(want[:at])
    assert deltas[-1].finish_reason is FinishReason.STOP and deltas[-1].stop_reason == stop_id


async def test_the_models_end_of_sequence_ends_without_a_stop_reason(start: Start, tokenizer: Tokenizer) -> None:
    service, _ = await start()
    eos_ids = tokenizer.eos_token_ids
    seed = next(seed for seed in range(100) if any(token_id in eos_ids for token_id in truth(50, seed).token_ids))
    want = truth(50, seed, stop_token_ids=eos_ids)
    deltas = await collect(service, ask(seed=seed, ignore_eos=False, max_tokens=50))
    assert token_ids(deltas) == want.token_ids
    assert deltas[-1].finish_reason is FinishReason.STOP and deltas[-1].stop_reason is None


async def test_prompt_logprobs_come_with_the_first_delta(start: Start) -> None:
    service, _ = await start()
    deltas = await collect(service, ask(prompt_logprobs=0))
    assert deltas[0].prompt_logprobs == tuple(prompt_logprob(PROMPT[:i], PROMPT[i]) for i in range(1, len(PROMPT)))
    assert not any(delta.prompt_logprobs for delta in deltas[1:])


async def test_closing_the_iterator_reaches_the_engine_within_the_step(start: Start) -> None:
    service, (shard,) = await start()
    shard.executor.allow(3)
    stream = service.generate([ask(n=2, max_tokens=1000)])
    await anext(stream)
    await stream.aclose()
    await shard.until_empty()                   # while the fourth step is still in flight
    assert len(shard.executor.plans) <= 3
    assert service._admission.num_open == 0 and len(service._journal) == 0


async def test_a_cancelled_task_cancels_its_request(start: Start) -> None:
    service, (shard,) = await start()
    shard.executor.allow(0)
    task = asyncio.create_task(collect(service, ask()))
    await until(lambda: shard.num_open > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await shard.until_empty()
    assert counter(service, 'request_success_total{finished_reason="cancelled"}') == 1


async def test_a_deadline_ends_the_request_here_and_there(start: Start) -> None:
    service, (shard,) = await start()
    shard.executor.allow(2)
    with pytest.raises(DeadlineExceededError, match="deadline passed after [012] tokens"):
        await collect(service, ask(deadline_s=0.2))
    await shard.until_empty()
    assert counter(service, 'request_success_total{finished_reason="failed"}') == 1


async def test_over_the_bounds_is_refused_with_a_time_to_come_back(start: Start) -> None:
    service, (shard,) = await start(max_open_requests=1, max_queued_requests=1)
    shard.executor.allow(0)
    tasks = [asyncio.create_task(collect(service, ask())) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError) as refusal:
        await collect(service, ask())
    assert refusal.value.retry_after_s >= 1.0
    assert counter(service, 'request_refused_total{error="OverloadedError"}') == 1
    shard.executor.allow(None)
    assert [token_ids(deltas) for deltas in await asyncio.gather(*tasks)] == [truth().token_ids] * 2


async def test_tenants_take_turns(start: Start) -> None:
    service, (shard,) = await start(max_open_requests=1)
    shard.executor.allow(0)
    order: list[str] = []

    async def run(tenant: str) -> None:
        await collect(service, ask(tenant=Tenant(tenant)))
        order.append(tenant)

    tasks = [asyncio.create_task(run(tenant)) for tenant in ["a", "a", "a", "a", "b", "b"]]
    await asyncio.sleep(0)
    shard.executor.allow(None)
    await asyncio.gather(*tasks)
    assert order == ["a", "b", "a", "b", "a", "a"]


async def test_a_consumer_that_does_not_read_holds_only_itself(start: Start) -> None:
    service, (shard,) = await start()
    slow = service.generate([ask(max_tokens=500)])
    _, first = await anext(slow)
    assert token_ids(await collect(service, ask(seed=8, max_tokens=600))) == truth(600, seed=8).token_ids
    await shard.until_empty()                   # the slow one's too: nobody waits for its reader
    rest = [delta async for _, delta in slow]
    assert token_ids([first, *rest]) == truth(500).token_ids


@pytest.mark.parametrize(("request_", "error", "message"), [
    (GenerationRequest("id", "other", PROMPT, SamplingParams()), ModelNotFoundError, "'other' is not.*use one of: m"),
    (ask(prompt=()), InvalidRequestError, "no tokens"),
    (ask(prompt=(1, 512)), InvalidRequestError, "token id 512, .*0 to 511"),
    (ask(logit_bias={600: 1.0}), InvalidRequestError, "logit_bias holds the token id 600"),
    (ask(stop_token_ids=(600,)), InvalidRequestError, "stop_token_ids"),
    (ask(n=99), InvalidRequestError, "at most 64"),
    (ask(prompt=PROMPT * 100, max_tokens=None), ContextLengthError, "2000 tokens. However, your prompt has 2000"),
    (ask(max_tokens=1990), ContextLengthError, r"2010 tokens \(20 in the prompt, 1990 in the completion\).*most 1980"),
])
async def test_what_can_never_work_is_refused_at_once(start: Start, request_: GenerationRequest,
                                                      error: type[ServingError], message: str) -> None:
    service, (shard,) = await start(max_open_requests=64)
    with pytest.raises(error, match=message):
        await collect(service, request_)
    assert shard.engine.num_steps == 0 and service._admission.num_open == 0


async def test_a_kv_cache_smaller_than_the_context_is_the_limit(start: Start) -> None:
    service, _ = await start(num_blocks=4)
    with pytest.raises(ContextLengthError, match="KV cache of this model's largest shard holds 65 tokens"):
        await collect(service, ask(max_tokens=46))
    assert token_ids(await collect(service, ask(max_tokens=45))) == truth(45).token_ids
    assert token_ids(await collect(service, ask(max_tokens=None))) == truth(45).token_ids


async def test_before_the_first_epoch_the_service_is_not_ready(tokenizer: Tokenizer) -> None:
    service = InferenceService(ModelCard("m", 100, 0), tokenizer, RouterConfig(), SCHEDULER, RouterMetrics(), clock)
    assert not service.is_ready()
    with pytest.raises(NotReadyError):
        await collect(service, ask())


async def test_while_the_shards_sleep_requests_are_held_until_these_have_come(
        start: Start, tokenizer: Tokenizer) -> None:
    _, shards = await start()
    service = InferenceService(ModelCard("m", 100, 0), tokenizer, RouterConfig(), SCHEDULER, RouterMetrics(), clock)
    service.is_asleep = lambda: True
    assert service.is_ready() and service.has_room()
    held = asyncio.create_task(collect(service, ask()))
    try:
        await until(lambda: service.load().num_held == 1)
        service.set_epoch(epoch_with(1, *shards))
        assert token_ids(await held) == truth().token_ids
    finally:
        await service.close()


async def test_the_next_turn_of_a_chat_finds_its_cached_prefix(start: Start) -> None:
    service, shards = await start(num_shards=3)
    prompt = tuple(range(64))
    answer = token_ids(await collect(service, ask(prompt, max_tokens=64)))
    await asyncio.gather(*(collect(service, ask(tuple(range(100 + i, 120 + i)), max_tokens=5)) for i in range(4)))
    deltas = await collect(service, ask((*prompt, *answer, 1, 2, 3)))
    assert deltas[0].num_cached_tokens == 112       # of 131: the last token of the answer was never computed


async def test_closing_the_service_ends_every_request(start: Start) -> None:
    service, (shard,) = await start(max_open_requests=1)
    shard.executor.allow(0)
    tasks = [asyncio.create_task(collect(service, ask())) for _ in range(2)]
    await until(lambda: shard.num_open > 0)
    await service.close()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, NotReadyError)
    await shard.until_empty()


async def test_a_fault_in_one_requests_text_fails_only_that_request(start: Start,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    service, (shard,) = await start()
    shard.executor.allow(0)
    bad, good = asyncio.create_task(collect(service, ask())), asyncio.create_task(collect(service, ask(seed=8)))
    await until(lambda: shard.num_open == 2)
    _, choice = next(iter(service._open.values()))
    monkeypatch.setattr(choice._text, "push", lambda token_ids: 1 / 0)
    shard.executor.allow(None)
    with pytest.raises(ServingError, match="ZeroDivisionError"):
        await bad
    assert token_ids(await good) == truth(seed=8).token_ids


async def test_a_request_that_does_not_fit_the_wire_fails_alone(start: Start) -> None:
    """Found by top_k=2**32: the link's write side ended unseen, and all later requests waited for ever."""
    service, shards = await start()
    wide = ask()
    wide = replace(wide, params=wide.params.model_copy(update={"top_k": 2**32}))
    with pytest.raises(InvalidRequestError, match="cannot be sent to a shard"):
        await collect(service, wide)
    assert service.is_ready()
    deltas = await collect(service, ask())
    assert sum((delta.token_ids for delta in deltas), ()) == truth().token_ids
    await shards[0].until_empty()


class OddError(BaseException):
    """What a library may raise that means to end the process."""


@pytest.mark.parametrize("kind", [RuntimeError, OddError, asyncio.CancelledError, GeneratorExit])
@pytest.mark.parametrize("name", ["encode_updates", "encode_load"])
async def test_whatever_ends_the_shards_writer_the_link_is_made_again(start: Start, monkeypatch: pytest.MonkeyPatch,
                                                                      name: str, kind: type[BaseException]) -> None:
    service, (shard,) = await start()
    encode, num_calls = getattr(link_server, name), 0

    def break_once(*args: Any) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise kind("a fault of ours")
        return encode(*args)
    monkeypatch.setattr(link_server, name, break_once)
    assert token_ids(await collect(service, ask())) == truth().token_ids
    assert token_ids(await collect(service, ask())) == truth().token_ids
    await shard.until_empty()
