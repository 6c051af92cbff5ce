"""Both ends of the shard link, over real gRPC on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest

from model.step import SamplingSpec
from serving.engine.request import FinishReason, Submission, TokenEvent
from serving.errors import InvalidRequestError
from serving.link.client import ShardLinkClient, SubmissionQueue
from serving.link.messages import decode_updates, error_of_text
from serving.link.server import ShardLinkServer, start_link_server
from serving.proto import shard_pb2, shard_pb2_grpc
from serving.supervision import first_end, owned_tasks
from tests.serving.link.fake_link import NUM_EMBEDDINGS, RecordingEngine, RecordingOwner, clock, member


@dataclass
class Shard:
    engine: RecordingEngine
    servicer: ShardLinkServer
    server: grpc.aio.Server
    port: int


@pytest.fixture
async def shard() -> AsyncIterator[Shard]:
    engine, servicer = RecordingEngine(), ShardLinkServer("s0", clock)
    server, port = await start_link_server(servicer, "127.0.0.1:0")
    servicer.serve(engine, NUM_EMBEDDINGS)
    yield Shard(engine, servicer, server, port)
    servicer.stop("the test ends")
    await server.stop(None)


@asynccontextmanager
async def linked(port: int, shard_id: str = "s0", router_id: str = "r",
                 window: int = 8) -> AsyncIterator[tuple[ShardLinkClient, RecordingOwner]]:
    owner = RecordingOwner()
    link = ShardLinkClient(member(port), lambda: SubmissionQueue(shard_id, router_id, window, clock), owner)
    link.start()
    try:
        yield link, owner
    finally:
        await link.close()


async def connected(owner: RecordingOwner, times: int = 1) -> None:
    await owner.changed.until(lambda: owner.num_connected == times)


def submission(request_id: str, num_prompt: int = 3) -> Submission:
    return Submission(request_id, tuple(range(num_prompt)), SamplingSpec(), 5)


async def test_submissions_go_up_and_one_message_per_step_comes_down(shard: Shard) -> None:
    async with linked(shard.port) as (link, owner):
        await connected(owner)
        assert link.load is not None and link.load.kv_blocks_total == 10
        link.submit(submission("a"))
        link.submit(submission("b"))
        await shard.engine.changed.until(lambda: len(shard.engine.submissions) == 2)
        for step in range(5):
            num_before = owner.num_messages
            shard.servicer.deliver("r", step, [TokenEvent("a", (step,)), TokenEvent("b", (step,))])
            await owner.changed.until(lambda before=num_before: owner.num_messages > before)
            assert owner.num_messages == num_before + 1
        assert [event.token_ids for event in owner.events if event.request_id == "a"] == [(i,) for i in range(5)]
        assert link.load.num_running == 2


async def test_what_gathers_before_a_write_goes_in_one_message() -> None:
    queue = SubmissionQueue("s0", "r", 8, clock)
    messages = queue.messages()
    first = await anext(messages)
    assert (first.shard_id, first.router_id, first.window) == ("s0", "r", 8)
    queue.submit(submission("a"))
    queue.submit(submission("b"))
    queue.cancel("b")               # the shard need never hear of it
    queue.cancel("c")
    queue.handled(7)
    message = await anext(messages)
    assert [entry.request_id for entry in message.submissions] == ["a"]
    assert list(message.cancellations) == ["c"] and message.acknowledged_sequence == 7


async def test_acknowledgements_alone_wait_for_a_quarter_of_the_window() -> None:
    queue = SubmissionQueue("s0", "r", 8, clock)
    messages = queue.messages()
    await anext(messages)
    following = asyncio.ensure_future(anext(messages))
    queue.handled(1)
    await asyncio.sleep(0)
    assert not following.done()
    queue.handled(2)
    assert (await following).acknowledged_sequence == 2


async def test_cancellation_is_sent_at_once(shard: Shard) -> None:
    async with linked(shard.port) as (link, owner):
        await connected(owner)
        link.submit(submission("a"))
        await shard.engine.changed.until(lambda: len(shard.engine.submissions) == 1)
        link.cancel("a")
        await shard.engine.changed.until(lambda: shard.engine.cancelled == ["a"])


async def test_a_refused_submission_ends_with_the_engines_error(shard: Shard) -> None:
    async with linked(shard.port) as (link, owner):
        await connected(owner)
        link.submit(submission("long", num_prompt=101))
        await owner.changed.until(lambda: len(owner.events) == 1)
        event = owner.events[0]
        assert event.request_id == "long" and event.finish_reason is FinishReason.FAILED
        assert repr(error_of_text(event.error)) == "ContextLengthError('too long. shorten it')"


async def test_what_no_door_lets_in_is_refused_and_the_stream_goes_on(shard: Shard) -> None:
    async with linked(shard.port) as (link, owner):
        await connected(owner)
        link.submit(replace(submission("strange"), prompt_token_ids=(1, NUM_EMBEDDINGS)))
        link.submit(replace(submission("again"), prompt_token_ids=(1, NUM_EMBEDDINGS)))     # like the one before
        link.submit(submission("good"))
        await owner.changed.until(lambda: len(owner.events) == 2)
        await shard.engine.changed.until(lambda: len(shard.engine.submissions) == 1)
        assert [(event.request_id, event.finish_reason) for event in owner.events] == [
            ("strange", FinishReason.FAILED), ("again", FinishReason.FAILED)]
        error = error_of_text(owner.events[0].error)
        assert isinstance(error, InvalidRequestError)
        assert f"prompt_token_ids holds the token id {NUM_EMBEDDINGS}" in str(error)
        assert f"token ids are 0 to {NUM_EMBEDDINGS - 1}" in str(error)
        assert shard.engine.submissions[0].request_id == "good" and owner.num_connected == 1


@pytest.mark.parametrize("router_id", ["", "r" * 513])
async def test_a_stream_of_nobody_is_refused(shard: Shard, router_id: str) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{shard.port}") as channel:
        call = shard_pb2_grpc.ShardLinkStub(channel).Connect()
        await call.write(shard_pb2.ToShard(shard_id="s0", router_id=router_id, window=4))
        with pytest.raises(grpc.aio.AioRpcError, match="without a router's id"):
            await call.read()
    assert shard.engine.holds == []


async def test_a_closed_link_takes_its_sequences_out_of_the_engine(shard: Shard) -> None:
    async with linked(shard.port) as (_, owner):
        await connected(owner)
        assert shard.engine.disconnected == []
    await shard.engine.changed.until(lambda: shard.engine.disconnected == ["r"])


async def test_a_dead_shard_breaks_the_link(shard: Shard) -> None:
    async with linked(shard.port) as (link, owner):
        await connected(owner)
        await shard.server.stop(None)
        await owner.changed.until(lambda: len(owner.errors) == 1)
        assert "link to shard s0 on s0 broke" in str(owner.errors[0])
        assert not link.is_connected
    assert shard.engine.disconnected == ["r"]


async def test_a_broken_link_connects_again(shard: Shard) -> None:
    async with linked(shard.port) as (link, owner):
        await connected(owner)
        await shard.server.stop(None)
        await owner.changed.until(lambda: not link.is_connected)
        server, _ = await start_link_server(shard.servicer, f"127.0.0.1:{shard.port}")
        await connected(owner, times=2)
        assert link.is_connected
        await link.close()
        await server.stop(None)


async def test_an_owner_that_fails_breaks_only_the_stream(shard: Shard) -> None:
    async with linked(shard.port) as (_, owner):
        await connected(owner)
        owner.fails_on = "bad"
        shard.servicer.deliver("r", 1, [TokenEvent("bad")])
        await connected(owner, times=2)
        assert "the owner is broken" in str(owner.errors[0])


async def test_a_submission_that_cannot_be_encoded_fails_alone(shard: Shard) -> None:
    async with linked(shard.port) as (link, owner):
        await connected(owner)
        link.submit(submission("before"))
        link.submit(replace(submission("wide"), sampling=SamplingSpec(top_k=2**32)))
        link.submit(submission("after"))
        await owner.changed.until(lambda: len(owner.events) == 1)
        assert (owner.events[0].request_id, owner.events[0].finish_reason) == ("wide", FinishReason.FAILED)
        assert "cannot be sent to a shard: Value out of range: 4294967296" in owner.events[0].error
        await shard.engine.changed.until(lambda: len(shard.engine.submissions) == 2)
        assert link.is_connected and owner.num_connected == 1


async def test_an_event_that_cannot_be_encoded_fails_its_sequence_alone(shard: Shard) -> None:
    async with linked(shard.port) as (link, owner):
        await connected(owner)
        shard.servicer.deliver("r", 1, [TokenEvent("wide", (2**40,)), TokenEvent("good", (1,))])
        await owner.changed.until(lambda: len(owner.events) == 2)
        wide, good = owner.events
        assert (wide.request_id, wide.finish_reason) == ("wide", FinishReason.FAILED)
        assert "a token event could not be sent to the router" in wide.error
        assert good.token_ids == (1,) and link.is_connected and owner.num_connected == 1


async def test_a_submission_that_the_engine_cannot_take_fails_alone(shard: Shard) -> None:
    async with linked(shard.port) as (link, owner):
        await connected(owner)
        shard.engine.fails_on = "bad"
        link.submit(submission("bad"))
        link.submit(submission("good"))
        await shard.engine.changed.until(lambda: len(shard.engine.submissions) == 1)
        await owner.changed.until(lambda: len(owner.events) == 1)
        assert "the shard could not take the request up" in owner.events[0].error and owner.num_connected == 1


@pytest.mark.parametrize("part", ["_receive", "_send"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), asyncio.CancelledError()], ids=repr)
async def test_whatever_ends_the_reader_or_the_writer_the_link_connects_again(
        shard: Shard, part: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    works, breaks = getattr(ShardLinkClient, part), asyncio.Event()

    async def broken(*args: Any) -> None:
        async with owned_tasks(work=works(*args), end=breaks.wait()) as tasks:
            await first_end(tasks.values())
        raise error

    async with linked(shard.port) as (link, owner):
        await connected(owner)
        monkeypatch.setattr(ShardLinkClient, part, broken)
        await shard.server.stop(None)
        server, _ = await start_link_server(shard.servicer, f"127.0.0.1:{shard.port}")
        await connected(owner, times=2)
        monkeypatch.undo()
        breaks.set()
        await owner.changed.until(lambda: len(owner.errors) == 2)
        await connected(owner, times=3)
        link.submit(submission("a"))
        await shard.engine.changed.until(lambda: len(shard.engine.submissions) == 1)
        await link.close()
        await server.stop(None)


async def test_a_link_whose_task_was_cancelled_starts_again(shard: Shard) -> None:
    async with linked(shard.port) as (link, owner):
        await connected(owner)
        assert link._task is not None
        link._task.cancel()
        await connected(owner, times=2)
        assert len(owner.errors) == 1 and link.is_connected


async def test_bytes_that_are_no_message_end_the_stream_with_a_reason(shard: Shard) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{shard.port}") as channel:
        connect = channel.stream_stream("/moesaic.shard.v1.ShardLink/Connect")      # no serializer: bytes as they are
        call = connect()
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError, match="the stream began without a message"):
            await call.read()
        call = connect()
        await call.write(shard_pb2.ToShard(shard_id="s0", router_id="r", window=4).SerializeToString())
        await call.read()
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError, match="the shard could not handle a message: Error parsing"):
            await call.read()
        assert shard.engine.disconnected == ["r"]


async def test_a_long_prompt_goes_in_a_message_of_its_own() -> None:
    queue = SubmissionQueue("s0", "r", 8, clock)
    messages = queue.messages()
    await anext(messages)
    for name, num_prompt in (("a", 10), ("b", 70_000), ("c", 10), ("d", 10)):
        queue.submit(submission(name, num_prompt))
    names = [[entry.request_id for entry in (await anext(messages)).submissions] for _ in range(3)]
    assert names == [["a"], ["b"], ["c", "d"]]


async def test_a_router_that_connects_again_replaces_itself(shard: Shard) -> None:
    async with linked(shard.port) as (_, first):
        await connected(first)
        async with linked(shard.port) as (_, second):
            await connected(second)
            assert shard.engine.disconnected[0] == "r"


async def test_a_stream_that_is_meant_for_another_process_is_refused(shard: Shard) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{shard.port}") as channel:
        call = shard_pb2_grpc.ShardLinkStub(channel).Connect()
        await call.write(shard_pb2.ToShard(shard_id="of-yesterday", router_id="r", window=4,
                                           submissions=[shard_pb2.Submission(request_id="x")]))
        with pytest.raises(grpc.aio.AioRpcError, match="shard of-yesterday is not here any more; shard s0 has taken"):
            await call.read()
    assert shard.engine.submissions == [] and shard.engine.holds == []


async def test_streams_go_on_while_the_engine_changes_its_epoch(shard: Shard) -> None:
    """The server is not told of epochs at all: only of an engine that was made anew."""
    async with linked(shard.port) as (link, owner):
        await connected(owner)
        shard.servicer.deliver("r", 7, [TokenEvent("a", (1,))])
        shard.servicer.deliver("r", 0, [TokenEvent("a", (2,))])     # steps are counted from 0 again
        await owner.changed.until(lambda: sum((event.token_ids for event in owner.events), ()) == (1, 2))
        assert link.is_connected and owner.num_connected == 1


async def test_an_engine_that_is_made_anew_breaks_the_links_to_the_one_before(shard: Shard) -> None:
    later = RecordingEngine()
    async with linked(shard.port) as (link, owner):
        await connected(owner)
        shard.servicer.serve(later, NUM_EMBEDDINGS)
        await owner.changed.until(lambda: len(owner.errors) == 1)
        assert shard.engine.disconnected == ["r"] and "made anew" in str(owner.errors[0])
        await connected(owner, times=2)
        link.submit(submission("a"))
        await later.changed.until(lambda: len(later.submissions) == 1)


async def test_routers_wait_for_a_shard_that_has_no_engine_yet(shard: Shard) -> None:
    shard.servicer.stop("it loads")
    async with linked(shard.port) as (link, owner):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{shard.port}") as channel:     # by its answer the other waits
            await shard_pb2_grpc.ShardLinkStub(channel).Ring(shard_pb2.RingRequest(epoch_number=1, step_index=1))
        assert owner.num_connected == 0
        shard.servicer.serve(shard.engine, NUM_EMBEDDINGS)
        await connected(owner)
        link.submit(submission("a"))
        await shard.engine.changed.until(lambda: len(shard.engine.submissions) == 1)


async def test_a_router_that_waits_too_long_for_an_engine_comes_again() -> None:
    servicer, engine = ShardLinkServer("s0", clock, engine_wait_s=0.0), RecordingEngine()
    server, port = await start_link_server(servicer, "127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = shard_pb2_grpc.ShardLinkStub(channel).Connect()
        await call.write(shard_pb2.ToShard(shard_id="s0", router_id="r", window=4))
        with pytest.raises(grpc.aio.AioRpcError, match="shard s0 has no engine yet"):
            await call.read()
    async with linked(port) as (_, owner):
        servicer.serve(engine, NUM_EMBEDDINGS)
        await connected(owner)
    servicer.stop("the test ends")
    await server.stop(None)


async def test_what_comes_late_on_a_stream_that_was_given_up_is_not_heard(shard: Shard) -> None:
    """A submission of it would be taken for one of the router's new stream, a cancellation end what was sent again."""
    async def late() -> AsyncIterator[shard_pb2.ToShard]:
        shard.servicer._register(shard_pb2.ToShard(shard_id="s0", router_id="r", window=4), shard.engine)
        yield shard_pb2.ToShard(submissions=[shard_pb2.Submission(request_id="a")], cancellations=["b"])

    first = shard.servicer._register(shard_pb2.ToShard(shard_id="s0", router_id="r", window=4), shard.engine)
    await shard.servicer._read(first, late())
    assert shard.engine.submissions == [] and shard.engine.cancelled == []
    assert shard.engine.disconnected == ["r"]       # of the first stream, once: the second one serves


async def test_a_router_that_does_not_acknowledge_is_held_and_only_that_one(shard: Shard) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{shard.port}") as channel, linked(shard.port) as (_, owner):
        silent = shard_pb2_grpc.ShardLinkStub(channel).Connect()
        await silent.write(shard_pb2.ToShard(shard_id="s0", router_id="silent", window=2))
        await silent.read()
        await connected(owner)
        for step in range(20):
            for router_id in ("silent", "r"):
                shard.servicer.deliver(router_id, step, [TokenEvent(f"of-{router_id}", (step,))])
            await owner.changed.until(lambda step=step: len(owner.events) == step + 1)
        assert [hold for hold in shard.engine.holds if hold[1]] == [("silent", True)]
        received = []
        while len(received) < 20:
            message = await silent.read()
            received += [token_id for event in decode_updates(message) for token_id in event.token_ids]
            await silent.write(shard_pb2.ToShard(acknowledged_sequence=message.sequence))
        assert received == list(range(20))
        await shard.engine.changed.until(lambda: shard.engine.holds[-1] == ("silent", False))
        silent.cancel()


async def test_every_router_learns_the_load_of_a_working_shard(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.link.server.LOAD_REFRESH_S", 0.0)
    async with linked(shard.port, router_id="busy") as (_, busy), linked(shard.port, router_id="idle") as (link, idle):
        await connected(busy)
        await connected(idle)
        shard.engine.submit("busy", submission("a"))
        shard.servicer.deliver("busy", 1, [TokenEvent("a", (1,))])
        await idle.changed.until(lambda: idle.num_messages == 1)
        assert idle.events == [] and link.load is not None and link.load.num_running == 1


async def test_an_address_in_use_is_an_error(shard: Shard) -> None:
    with pytest.raises(RuntimeError):
        await start_link_server(shard.servicer, f"127.0.0.1:{shard.port}")
