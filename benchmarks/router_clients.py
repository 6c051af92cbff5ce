"""The clients of `router_cost.py`: they stream answers over one door of a router, or over its link to a shard."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
import uvloop

from model.step import SamplingSpec
from serving.engine.request import Submission, TokenEvent
from serving.errors import ShardFailedError
from serving.link.client import ShardLinkClient, SubmissionQueue
from serving.link.epoch import DeviceFacts, Member
from serving.proto import inference_pb2 as pb
from serving.proto.inference_pb2_grpc import InferenceStub

MODEL = "m"
CONTEXT = 4096
TOLD_AT_THE_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Load:
    door: str
    port: int
    num_clients: int
    num_answers: int        # of each client, one after the other
    num_tokens: int         # of each answer


@dataclass(slots=True)
class Told:
    """What came of a load. `firsts_s`: of the client that asks for one token at a time."""

    wall_s: float = 0.0
    client_s: float = 0.0   # processor time
    num_messages: int = 0
    firsts_s: list[float] = field(default_factory=list)


# Streams an answer of so many tokens: yields 0 when the first has come, then the number of its messages.
Answer = Callable[[int], AsyncIterator[int]]
Connect = Callable[[], contextlib.AbstractAsyncContextManager[Answer]]


def run_load(load: Load, asks_for_firsts: bool) -> Told:
    before_s = time.process_time()
    told: Told = uvloop.run(run(load, asks_for_firsts))
    told.client_s = time.process_time() - before_s
    return told


async def run(load: Load, asks_for_firsts: bool) -> Told:
    told = Told()

    async def stream(answer: Answer) -> None:
        for _ in range(load.num_answers):
            async for num_messages in answer(load.num_tokens):
                told.num_messages += num_messages

    async def ask_for_firsts(answer: Answer) -> None:
        while True:
            began_s = time.perf_counter()
            async for num_messages in answer(1):
                if num_messages == 0:
                    told.firsts_s.append(time.perf_counter() - began_s)

    async with contextlib.AsyncExitStack() as stack:
        connect = await stack.enter_async_context(connector(load))
        answers = [await stack.enter_async_context(connect()) for _ in range(load.num_clients + 1)]
        began_s = time.perf_counter()
        asker = asyncio.create_task(ask_for_firsts(answers[0])) if asks_for_firsts else None
        await asyncio.gather(*map(stream, answers[1:]))
        told.wall_s = time.perf_counter() - began_s
        if asker is not None:
            asker.cancel()
            await asyncio.gather(asker, return_exceptions=True)
    return told


@contextlib.asynccontextmanager
async def connector(load: Load) -> AsyncIterator[Connect]:
    """Yield what gives a client of this load its connection."""
    if load.door == "link":
        async with link_to_shard(load.port) as link:
            yield lambda: contextlib.nullcontext(link.answer)
    elif load.door == "grpc-shared":
        async with grpc_connection(load.port) as answer:
            yield lambda: contextlib.nullcontext(answer)
    elif load.door.startswith("grpc"):
        yield lambda: grpc_connection(load.port)
    else:
        yield lambda: http_connection(load.port, load.door)


@contextlib.asynccontextmanager
async def http_connection(port: int, door: str) -> AsyncIterator[Answer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    path, fields = ("chat/completions", {"messages": [{"role": "user", "content": "hello"}]}) if door == "chat" \
        else ("completions", {"prompt": "hello", "return_token_ids": door == "ids"})

    async def answer(num_tokens: int) -> AsyncIterator[int]:
        body = json.dumps({"model": MODEL, "max_tokens": num_tokens, "stream": True, "ignore_eos": True,
                           "temperature": 0, **fields})
        writer.write(f"POST /v1/{path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                     f"content-length: {len(body)}\r\n\r\n{body}".encode())
        head = await reader.readuntil(b"data: ")
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise RuntimeError(head)
        yield 0
        content = b""
        while not content.endswith(TOLD_AT_THE_END):
            chunk = await reader.read(1 << 16)
            if not chunk:
                raise RuntimeError("the stream broke")
            content += chunk
        yield content.count(b"data: ") - (door == "chat")       # a chat's first chunk only says the role

    try:
        yield answer
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def grpc_connection(port: int) -> AsyncIterator[Answer]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[
            ("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = InferenceStub(channel)

        async def answer(num_tokens: int) -> AsyncIterator[int]:
            sampling = pb.Sampling(max_tokens=num_tokens, ignore_eos=True, temperature=0)
            num_messages = 0
            async for _ in stub.Generate(pb.GenerateRequest(model=MODEL, text="hello", sampling=sampling)):
                if num_messages == 0:
                    yield 0
                num_messages += 1
            yield num_messages
        yield answer


def member_at(port: int) -> Member:
    """Return the shard whose link is at a port."""
    return Member("s0", "default", "n0", "n0", f"127.0.0.1:{port}", DeviceFacts("cpu", "stub", "stub", 1, 1))


@contextlib.asynccontextmanager
async def link_to_shard(port: int) -> AsyncIterator[LinkToShard]:
    link = LinkToShard(port)
    await link.connected.wait()
    try:
        yield link
    finally:
        await link.client.close()


class LinkToShard:
    """The least that a router must do: it sends sequences to a shard and hears of their tokens."""

    def __init__(self, port: int) -> None:
        self.connected = asyncio.Event()
        self._numbers = itertools.count()
        self._queues: dict[str, asyncio.Queue[TokenEvent]] = {}
        self.client = ShardLinkClient(
            member_at(port), lambda: SubmissionQueue("s0", "alone", 1024, time.monotonic), self)
        self.client.start()

    async def answer(self, num_tokens: int) -> AsyncIterator[int]:
        name, queue = f"alone-{next(self._numbers)}", asyncio.Queue[TokenEvent]()
        self._queues[name] = queue
        self.client.submit(Submission(name, (9,), SamplingSpec(temperature=0.0), num_tokens))
        num_messages = 0
        while True:
            event = await queue.get()
            if num_messages == 0:
                yield 0
            num_messages += 1
            if event.finish_reason is not None:
                break
        del self._queues[name]
        yield num_messages

    def link_connected(self, link: ShardLinkClient) -> None:
        self.connected.set()

    def link_events(self, link: ShardLinkClient, events: list[TokenEvent]) -> None:
        for event in events:
            self._queues[event.request_id].put_nowait(event)

    def link_broken(self, link: ShardLinkClient, error: ShardFailedError) -> None:
        raise error
