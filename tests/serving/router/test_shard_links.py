"""Shards come, leave and die under a router's service: every stream goes on with the same tokens, or waits."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import ContextLengthError, DeadlineExceededError, OverloadedError, ShardFailedError
from serving.link.epoch import Member
from serving.router import shard_links
from serving.router.generation import GenerationRequest
from serving.sampling_params import MAX_COUNT
from serving.text.tokenizer import Tokenizer
from tests.serving.link.fake_link import member
from tests.serving.router.served_shards import (
    Shard,
    Start,
    ask,
    collect,
    counter,
    epoch_with,
    text,
    token_ids,
    truth,
    until,
    until_streaming,
)
from tests.serving.router.stepped_links import ALL, Answer, Client, SteppedLink, World, turns


async def test_a_dead_shards_requests_go_on_elsewhere_with_the_same_tokens(start: Start, tokenizer: Tokenizer) -> None:
    service, shards = await start(num_shards=2)
    for shard in shards:
        shard.executor.allow(5)
    tasks = [asyncio.create_task(collect(service, ask(seed=seed, max_tokens=40, logprobs=0))) for seed in range(4)]
    await until_streaming(service, 4)
    await shards[0].die()
    shards[1].executor.allow(None)
    for seed, deltas in enumerate(await asyncio.gather(*tasks)):
        want = truth(40, seed=seed).token_ids
        assert token_ids(deltas) == want and text(deltas) == tokenizer.decode(want)
        assert [entry.token_id for delta in deltas for entry in delta.logprobs] == list(want)
    assert counter(service, 'sequences_moved_total{way="resubmitted"}') == 2
    assert counter(service, 'stream_pause_seconds_count{cause="link_broken"}') == 2
    assert service.is_ready() and not service._links.is_complete


async def test_with_no_shard_left_requests_wait_for_the_next_one(start: Start) -> None:
    service, (shard,) = await start()
    shard.executor.allow(3)
    open_before = asyncio.create_task(collect(service, ask()))
    await until(lambda: shard.executor.num_allowed == 0)
    await shard.die()
    await until(lambda: not service.is_ready())
    new = asyncio.create_task(collect(service, ask(seed=8)))
    await until(lambda: counter(service, "num_requests_unplaced") == 2)
    later = Shard(shard_id="later")
    await later.start()
    service.set_epoch(epoch_with(2, later))
    assert token_ids(await open_before) == truth().token_ids and token_ids(await new) == truth(seed=8).token_ids
    assert counter(service, "num_requests_unplaced") == 0
    await service.close()
    await later.stop()


async def test_what_waits_for_a_shard_ends_at_its_deadline(start: Start) -> None:
    service, (shard,) = await start(max_open_requests=2, max_queued_requests=1)
    await shard.die()
    await until(lambda: not service.is_ready())
    waiting = [asyncio.create_task(collect(service, ask(deadline_s=0.1))) for _ in range(3)]
    await until(lambda: service._admission.num_queued == 1)
    with pytest.raises(OverloadedError):
        await collect(service, ask())
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, DeadlineExceededError)
    assert service._unplaced == {} and service._admission.num_open == 0


async def test_sequences_on_members_that_stay_are_not_touched_by_a_new_epoch(start: Start) -> None:
    service, shards = await start(num_shards=3)
    for shard in shards:
        shard.executor.allow(5)
    tasks = [asyncio.create_task(collect(service, ask(seed=seed, max_tokens=40))) for seed in range(6)]
    await until_streaming(service, 6)
    accepted = [shard.scheduler._num_arrived for shard in shards]
    service.set_epoch(epoch_with(2, *shards[1:]))
    await shards[0].until_empty()
    for shard in shards[1:]:
        shard.executor.allow(None)
    for seed, deltas in enumerate(await asyncio.gather(*tasks)):
        assert token_ids(deltas) == truth(40, seed=seed).token_ids
    assert sum(shard.scheduler._num_arrived for shard in shards) == sum(accepted) + accepted[0]
    assert counter(service, 'stream_pause_seconds_count{cause="member_gone"}') == accepted[0] == 2
    service.set_epoch(epoch_with(1, *shards))               # late: ignored
    assert service.epoch_number == 2 and service.is_ready()
    assert 's0' not in service._metrics.render()[0].decode()


async def test_a_member_that_comes_in_takes_part_and_the_others_keep_their_prefixes(start: Start) -> None:
    service, (shard,) = await start()
    prompt = tuple(range(64))
    await collect(service, ask(prompt))
    later = Shard(shard_id="later")
    await later.start()
    service.set_epoch(epoch_with(2, shard, later))
    await until(lambda: service._links.is_complete)
    await asyncio.gather(*(collect(service, ask(seed=seed)) for seed in range(4)))
    assert later.scheduler._num_arrived > 0
    assert (await collect(service, ask((*prompt, 1))))[0].num_cached_tokens == 64
    await service.close()
    await later.stop()


async def test_a_member_that_leaves_gets_nothing_new(start: Start) -> None:
    service, shards = await start(num_shards=2)
    for shard in shards:
        shard.executor.allow(0)
    service.set_epoch(epoch_with(1, *shards), leaving=("s0",))
    tasks = [asyncio.create_task(collect(service, ask(seed=seed))) for seed in range(3)]
    await until(lambda: shards[1].num_open == 3)
    service.set_epoch(epoch_with(1, *shards), leaving=("s0", "s1"))
    last = asyncio.create_task(collect(service, ask(seed=3)))
    await until(lambda: list(service._unplaced) != [])
    assert shards[0].num_open == 0
    service.set_epoch(epoch_with(1, *shards))               # the drain was taken back
    for shard in shards:
        shard.executor.allow(None)
    for seed, deltas in enumerate(await asyncio.gather(*tasks, last)):
        assert token_ids(deltas) == truth(seed=seed).token_ids


async def test_a_link_that_breaks_while_its_shard_lives_costs_nothing_but_a_pause(start: Start) -> None:
    service, (shard,) = await start()
    shard.executor.allow(5)
    task = asyncio.create_task(collect(service, ask(max_tokens=40)))
    await until(lambda: shard.executor.num_allowed == 0)
    for stream in list(shard.servicer._streams.values()):
        shard.servicer._drop(stream, "the network broke")
    await until(lambda: shard.num_open == 0 and not service.is_ready())
    shard.executor.allow(None)
    assert token_ids(await task) == truth(40).token_ids
    assert shard.scheduler._num_arrived == 2
    await shard.until_empty()


async def test_a_sequence_that_only_a_lost_shard_can_hold_waits_until_it_is_known_to_be_gone(start: Start) -> None:
    service, (small,) = await start(num_blocks=4)
    large = Shard(shard_id="large")
    await large.start()
    service.set_epoch(epoch_with(2, small, large))
    await until(lambda: service._links.is_complete)
    large.executor.allow(3)
    task = asyncio.create_task(collect(service, ask(max_tokens=200)))
    await until(lambda: large.executor.num_allowed == 0)
    await large.die()
    new = asyncio.create_task(collect(service, ask(max_tokens=100)))    # nor is it refused
    await until(lambda: len(service._unplaced) == 2)
    service.set_epoch(epoch_with(3, small))
    with pytest.raises(ShardFailedError, match="of 23 tokens is gone, and the KV cache of this model's largest shard"):
        await task
    with pytest.raises(ContextLengthError, match="holds 65 tokens"):
        await new
    await large.stop()


async def test_a_request_that_comes_while_links_are_made_waits_for_them(start: Start) -> None:
    service, (shard,) = await start()
    later = Shard(shard_id="later")
    await later.start()
    later.servicer.stop("it loads")
    service.set_epoch(epoch_with(2, later))
    task = asyncio.create_task(collect(service, ask()))
    await until(lambda: list(service._unplaced) != [])
    later.servicer.serve(later.engine, MAX_COUNT)
    assert token_ids(await task) == truth().token_ids
    await shard.until_empty()
    await service.close()
    await later.stop()


async def test_a_fault_in_placing_one_request_again_leaves_the_others_alone(start: Start,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    service, shards = await start(num_shards=2)
    for shard in shards:
        shard.executor.allow(2)
    asked = [asyncio.create_task(collect(service, ask(seed=seed))) for seed in range(4)]
    await until(lambda: sum(shard.num_open for shard in shards) == 4)
    lost = next(shard for shard in shards if shard.num_open)
    place, num_calls = service._links.place, 0

    def break_once(*args: Any, **options: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise RuntimeError("a fault of ours")
        place(*args, **options)
    monkeypatch.setattr(service._links, "place", break_once)
    await lost.die()
    await until(lambda: num_calls > 1)
    for shard in shards:
        shard.executor.allow(None)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [str(answer) for answer in answers if isinstance(answer, BaseException)] == [
        "the router failed the request: RuntimeError('a fault of ours')"]
    assert all(token_ids(answer) == truth(seed=seed).token_ids
               for seed, answer in enumerate(answers) if not isinstance(answer, BaseException))


async def test_two_members_die_one_after_the_other_under_requests_of_every_kind(start: Start,
                                                                                tokenizer: Tokenizer) -> None:
    """The second one while what the first one had is on its way to it."""
    service, shards = await start(num_shards=3)
    for shard in shards:
        shard.executor.allow(3)
    clients = [Client(requests_of(kind, tokenizer)) for kind in range(NUM_KINDS)]
    tasks = [asyncio.create_task(client.run(service)) for client in clients]
    await until(lambda: all(shard.executor.num_allowed == 0 for shard in shards))
    await shards[0].die()
    await until(lambda: "s0" not in {shard.shard_id for shard in service._links.snapshots()})
    await shards[1].die()
    shards[2].executor.allow(None)
    await asyncio.gather(*tasks)
    for kind, client in enumerate(clients):
        assert client.answer() == undisturbed(kind, tokenizer)
    await shards[2].until_empty()


async def test_a_client_that_reads_late_gets_what_a_move_has_left_of_its_stream_untouched(start: Start) -> None:
    service, shards = await start(num_shards=2)
    stream = service.generate([ask(max_tokens=400)])
    _, first = await anext(stream)
    lost = next(shard for shard in shards if shard.scheduler._num_arrived)
    await lost.die()
    other = next(shard for shard in shards if shard is not lost)
    await until(lambda: not service._open)              # all that it gets is there, and nobody waited for it
    assert token_ids([first, *[delta async for _, delta in stream]]) == truth(400).token_ids
    await other.until_empty()


async def test_a_client_may_leave_while_its_sequence_has_no_shard(start: Start) -> None:
    service, (shard,) = await start()
    shard.executor.allow(3)
    task = asyncio.create_task(collect(service, ask(n=2)))
    await until(lambda: shard.executor.num_allowed == 0)
    await shard.die()
    await until(lambda: len(service._unplaced) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert service._unplaced == {} and service._admission.num_open == 0 and len(service._journal) == 0


async def test_a_sequence_that_its_shard_gives_up_goes_on_elsewhere(start: Start) -> None:
    service, (shard,) = await start()
    shard.executor.allow(5)
    task = asyncio.create_task(collect(service, ask(max_tokens=40)))
    await until_streaming(service, 1)
    other = Shard(shard_id="other")
    await other.start()
    service.set_epoch(epoch_with(2, shard, other), leaving=("s0",))
    await until(lambda: service._links.is_complete)
    (sequence_id, router_id), = shard.engine._router_of.items()
    shard.engine.cancel(router_id, sequence_id)
    shard.executor.allow(None)
    assert token_ids(await task) == truth(40).token_ids
    assert counter(service, 'stream_pause_seconds_count{cause="given_up"}') == 1
    await shard.until_empty()
    await service.close()
    await other.stop()


async def test_a_sequence_that_every_shard_gives_up_fails(start: Start) -> None:
    service, (shard,) = await start()
    shard.scheduler.room = dataclasses.replace(shard.scheduler.room, num_blocks=1)     # it tells of more
    with pytest.raises(ContextLengthError, match="KV cache"):
        await collect(service, ask())
    assert service.is_ready() and service._admission.num_open == 0


@asynccontextmanager
async def lone_shard(shard_id: str) -> AsyncIterator[tuple[Process, Member]]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.serving.router.lone_shard", shard_id,
                                                   stdin=PIPE, stdout=PIPE)
    try:
        assert process.stdout is not None
        yield process, member(int(await process.stdout.readline()), shard_id)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_process_that_is_killed_loses_nothing(start: Start) -> None:
    service, (shard,) = await start()
    async with lone_shard("killed") as (process, killed):
        service.set_epoch(epoch_with(2, killed, shard), leaving=("s0",))
        await until(service.is_ready)
        stream = service.generate([ask(max_tokens=40)])
        _, first = await anext(stream)
        service.set_epoch(epoch_with(2, killed, shard))
        process.kill()
        assert token_ids([first, *[delta async for _, delta in stream]]) == truth(40).token_ids
        assert counter(service, 'stream_pause_seconds_count{cause="link_broken"}') == 1


async def test_a_process_that_was_thought_dead_does_no_harm_when_it_comes_back(start: Start) -> None:
    service, (shard,) = await start()
    async with lone_shard("stopped") as (process, stopped):
        service.set_epoch(epoch_with(2, stopped, shard), leaving=("s0",))
        await until(service.is_ready)
        stream = service.generate([ask(max_tokens=40)])
        _, first = await anext(stream)
        process.send_signal(signal.SIGSTOP)
        service.set_epoch(epoch_with(3, shard))      # at once, and not when its pings stay unanswered
        assert token_ids([first, *[delta async for _, delta in stream]]) == truth(40).token_ids
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.send_signal(signal.SIGCONT)
        service.set_epoch(epoch_with(4, stopped, shard), leaving=("s0",))
        await until(service.is_ready)
        assert token_ids(await collect(service, ask(seed=8))) == truth(seed=8).token_ids
        load = service._links._links["stopped"].load
        assert load is not None and load.num_sequences == 0     # what it had before was given up


# Any order of events, without a transport.

Events = list[tuple[str, int]]
NUM_KINDS = 6


def requests_of(kind: int, tokenizer: Tokenizer) -> list[GenerationRequest]:
    """Requests that differ in all that a move could break."""
    whole = tokenizer.decode(truth(12).token_ids)
    return [
        [ask(max_tokens=6)],
        [ask(n=3, max_tokens=5, logprobs=0)],
        [ask(max_tokens=4, prompt_logprobs=0, n=2)],
        [ask(stop=(whole[6:9],), max_tokens=12, logprobs=0)],
        [ask(max_tokens=3), ask(prompt=tuple(range(50, 90)), max_tokens=8, seed=9)],
        [ask(max_tokens=None, prompt=tuple(range(70, 90)), stop_token_ids=(5,), min_tokens=3)],
    ][kind % NUM_KINDS]


OF_WORLD: dict[str, Callable[[World, int], object]] = {
    "cancel": World.cancel,
    "begin step": lambda world, slot: world.shard_of(slot).begin_step(),
    "end step": lambda world, slot: world.shard_of(slot).end_step(),
    "work": lambda world, _: world.work(),
    "epoch": World.begin_epoch,     # these two: of the places that the number's bits say
    "leave": World.have_leave,
    "old epoch": lambda world, _: world.tell_old_epoch(),
    "kill": World.kill,
    "give up": World.give_up,
}
OF_LINK: dict[str, Callable[[SteppedLink], None]] = {
    "connect": SteppedLink.connect,
    "send": SteppedLink.send,
    "receive": SteppedLink.receive,
    "cut at the router": SteppedLink.notice_break,
    "cut at the shard": SteppedLink.lose_stream,
}
ACTIONS = ("ask", "ask", "ask", "work", "work", *OF_WORLD, *OF_LINK)


async def act(world: World, tokenizer: Tokenizer, action: str, number: int) -> None:
    """`number`: of a client, of a place of a shard, or several of those as bits."""
    if action == "ask":
        world.ask(requests_of(number, tokenizer))
    elif action in OF_LINK:
        if (link := world.link_of(number)) is not None:
            OF_LINK[action](link)
    elif inspect.isawaitable(done := OF_WORLD[action](world, number)):
        await done
    await turns()


async def run_events(events: Events, tokenizer: Tokenizer) -> World:
    """Let it all happen, and then go on undisturbed."""
    world = World(tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_links, "ShardLinkClient", world.new_link)
        patch.setattr(shard_links, "SETTLE_S", 0.0)
        world.begin_epoch(ALL)
        for action, number in events:
            await act(world, tokenizer, action, number)
        await world.finish()
        world.check()
        await world.close()
    return world


@functools.cache
def undisturbed(kind: int, tokenizer: Tokenizer) -> Answer:
    """In a loop of its own, on a thread for who has one."""
    with ThreadPoolExecutor(1) as thread:
        world = thread.submit(asyncio.run, run_events([("ask", kind)], tokenizer)).result()
    return world.clients[0].answer()


@settings(max_examples=150)
@given(events=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 7)), min_size=10, max_size=70))
def test_whatever_happens_every_stream_is_as_if_nothing_had(events: Events, tokenizer: Tokenizer) -> None:
    world = asyncio.run(run_events(events, tokenizer))
    kinds = [number for action, number in events if action == "ask"]
    for kind, client in zip(kinds, world.clients, strict=True):
        assert client.task is not None
        want = undisturbed(kind % NUM_KINDS, tokenizer)
        if not client.task.cancelled():
            assert client.task.exception() is None
            assert client.answer() == want
        for key, answer in client.answer().items():         # of a cancelled one too
            assert answer["token_ids"] == want[key]["token_ids"][:len(answer["token_ids"])]
            assert len(answer["ends"]) <= 1
