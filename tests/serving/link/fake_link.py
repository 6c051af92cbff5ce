"""Fakes for the tests of the shard link: an engine that records, an owner that records, and members on this machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from model.placement import Placement
from serving.engine.engine import ShardLoad
from serving.engine.request import Submission, TokenEvent
from serving.errors import ContextLengthError, ShardFailedError
from serving.link.client import ShardLinkClient
from serving.link.epoch import DeviceFacts, Epoch, Member
from tests.placements import even_shares

FACTS = DeviceFacts("cpu", "test", "test", 1, 1)
NUM_EMBEDDINGS = 100_000


def member(port: int, shard_id: str = "s0") -> Member:
    return Member(shard_id, "default", f"node-{shard_id}", shard_id, f"127.0.0.1:{port}", FACTS)


def epoch_of(number: int, *ports: int) -> Epoch:
    members = tuple(member(port, f"s{rank}") for rank, port in enumerate(ports))
    return Epoch(number, members, Placement(len(members), ()), "tcp://127.0.0.1:0",
                 even_shares(len(members)))


class Changed:
    """Lets a test wait until something has been recorded."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._event.clear()
            await self._event.wait()


class Cable:
    """Stands between both ends. Once it is cut nothing comes through and nothing is closed: what a lost node looks
    like."""

    def __init__(self, port: int) -> None:
        self._to_port = port
        self._is_cut = False
        self._tasks: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Cable:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self._is_cut = True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
        self._writers += (writer, up_writer)
        self._tasks += (asyncio.create_task(self._pump(reader, up_writer)),
                        asyncio.create_task(self._pump(up_reader, writer)))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while content := await reader.read(65536):
            if not self._is_cut:
                writer.write(content)


@dataclass
class RecordingEngine:
    """Takes everything, computes nothing. Prompts of more than 100 tokens are refused."""

    submissions: list[Submission] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    disconnected: list[str] = field(default_factory=list)
    holds: list[tuple[str, bool]] = field(default_factory=list)
    rings: list[tuple[int, int]] = field(default_factory=list)
    changed: Changed = field(default_factory=Changed)
    fails_on: str = ""

    def submit(self, router_id: str, submission: Submission) -> None:
        if len(submission.prompt_token_ids) > 100:
            raise ContextLengthError("too long", fix="shorten it")
        if submission.request_id == self.fails_on:
            raise RuntimeError("the engine is broken")
        self.submissions.append(submission)
        self.changed.set()

    def cancel(self, router_id: str, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.changed.set()

    def disconnect(self, router_id: str) -> None:
        self.disconnected.append(router_id)
        self.changed.set()

    def hold(self, router_id: str, held: bool) -> None:
        self.holds.append((router_id, held))
        self.changed.set()

    def ring(self, epoch_number: int, step_index: int) -> None:
        self.rings.append((epoch_number, step_index))
        self.changed.set()

    def load(self) -> ShardLoad:
        return ShardLoad(num_running=len(self.submissions), kv_blocks_free=10, kv_blocks_total=10)


@dataclass
class RecordingOwner:
    num_connected: int = 0
    events: list[TokenEvent] = field(default_factory=list)
    num_messages: int = 0
    errors: list[ShardFailedError] = field(default_factory=list)
    changed: Changed = field(default_factory=Changed)
    fails_on: str = ""

    def link_connected(self, link: ShardLinkClient) -> None:
        self.num_connected += 1
        self.changed.set()

    def link_events(self, link: ShardLinkClient, events: list[TokenEvent]) -> None:
        if any(event.request_id == self.fails_on for event in events):
            raise RuntimeError("the owner is broken")
        self.events += events
        self.num_messages += 1
        self.changed.set()

    def link_broken(self, link: ShardLinkClient, error: ShardFailedError) -> None:
        self.errors.append(error)
        self.changed.set()


clock = time.monotonic
