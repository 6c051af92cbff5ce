"""A router's service before shards of which every move is the test's: no transport, no waiting, any order of events.

Engines, schedulers, both ends of the link and all of the router are the real ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from model.placement import Placement
from serving.config import AdmissionConfig, RouterConfig
from serving.engine.engine import Engine
from serving.engine.request import FinishReason
from serving.engine.scheduler import Scheduler
from serving.link.client import ShardLinkClient
from serving.link.epoch import Epoch
from serving.link.security import LinkSecurity
from serving.link.server import RouterStream, ShardLinkServer
from serving.metrics import RouterMetrics
from serving.proto import shard_pb2
from serving.router.generation import GenerationDelta, GenerationRequest, ModelCard
from serving.router.service import InferenceService
from serving.sampling_params import MAX_COUNT
from serving.text.tokenizer import Tokenizer
from tests.placements import even_shares
from tests.serving.engine.fake_group import FakeExecutor, Group, KvModel, check_blocks
from tests.serving.link.fake_link import clock, member
from tests.serving.router.served_shards import BLOCK, MAX_MODEL_LEN, SCHEDULER

NUM_SLOTS = 3
NUM_BLOCKS = 12         # four sequences fit at once: others wait or are preempted
WINDOW = 4
ALL = (1 << NUM_SLOTS) - 1
Answer = dict[tuple[int, int], dict[str, Any]]      # by part and choice


async def turns(number: int = 8) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


class SteppedShard:
    """A shard process."""

    def __init__(self, shard_id: str) -> None:
        self.shard_id = shard_id
        self.is_alive = True
        self.executor = FakeExecutor(Group(1), 0, KvModel(BLOCK))
        self.scheduler = Scheduler(SCHEDULER, NUM_BLOCKS, MAX_MODEL_LEN)
        self.servicer = ShardLinkServer(shard_id, clock)
        self.engine = Engine(self.scheduler, self.executor, 1, clock, self._ring_nobody, self.servicer.deliver)
        self.servicer.serve(self.engine, MAX_COUNT)
        self._step: asyncio.Task[None] | None = None

    async def _ring_nobody(self, step_index: int) -> None:
        pass

    async def begin_step(self) -> None:
        if self.is_alive and self._step is None and self.engine._is_needed():
            self.executor.in_flight = asyncio.Event()
            self._step = asyncio.create_task(self.engine.step())
            await turns()

    async def end_step(self) -> None:
        if self._step is not None and self.executor.in_flight is not None:
            self.executor.in_flight.set()
            await self._step
            self._step = None

    async def stop(self) -> None:
        await self.end_step()
        self.servicer.stop("the test ends")

    def check_empty(self) -> None:
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.engine._router_of == {}
        check_blocks(self.scheduler.blocks, [])


class SteppedLink(ShardLinkClient):
    """Connects, carries messages and breaks when the test says so. Each end learns of a break at a time of its own."""

    shard: SteppedShard
    stream: RouterStream | None = None

    def start(self) -> None:
        pass

    async def close(self) -> None:
        self._is_closed, self._queue = True, None

    def connect(self) -> None:
        if self._is_closed:
            self.lose_stream()
        if self._is_closed or self.is_connected or not self.shard.is_alive:
            return
        queue = self._new_queue()
        greeting = shard_pb2.ToShard(shard_id=queue._shard_id, router_id=queue._router_id, window=WINDOW)
        self.stream = self.shard.servicer._register(greeting, self.shard.engine)
        self.load, self._queue = self.shard.engine.load(), queue
        self._owner.link_connected(self)

    def send(self) -> None:
        """Write what has gathered; the shard reads it unless it has given the stream up."""
        if self._queue is not None and self.stream is not None:
            message = self._queue._take()
            assert self._queue.take_refused() == []
            if self.shard.is_alive and not self.stream.is_over:
                self.stream.handle(message, clock())

    def receive(self) -> None:
        if self._queue is None or self.stream is None or self.stream.is_over or not self.shard.is_alive:
            return
        outbox = self.stream.outbox
        if outbox._wants_message and outbox._num_sent - outbox._num_acknowledged < WINDOW:
            outgoing = outbox._take_all()
            self.load = self.shard.engine.load()
            self._owner.link_events(self, list(outgoing.events))
            if self._queue is not None:
                self._queue.handled(outgoing.sequence)

    def notice_break(self) -> None:
        """The router does."""
        if self.is_connected:
            self._break("it was cut")

    def lose_stream(self) -> None:
        """The shard notices a break, perhaps one that the router has yet to notice."""
        if self.stream is not None and self.shard.is_alive:
            self.shard.servicer._drop(self.stream, "it was cut")


@dataclass
class Client:
    """One client and what it has got."""

    requests: Sequence[GenerationRequest]
    deltas: list[tuple[int, GenerationDelta]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    async def run(self, service: InferenceService) -> None:
        async for item in service.generate(self.requests):
            self.deltas.append(item)

    def answer(self) -> Answer:
        """By part and choice, however it came in pieces."""
        answer: Answer = {}
        for index, delta in self.deltas:
            found = answer.setdefault((index, delta.choice), {
                "text": "", "token_ids": (), "logprobs": (), "prompt_logprobs": (), "ends": ()})
            found["text"] += delta.text
            found["token_ids"] += delta.token_ids
            found["logprobs"] += delta.logprobs
            found["prompt_logprobs"] += delta.prompt_logprobs
            if delta.finish_reason is not None:
                found["ends"] += ((delta.finish_reason, delta.stop_reason),)
        return answer


class World:
    """Three places for shards; who dies there is followed by another process. Every method may be called at any time;
    what makes no sense then does nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.links: dict[str, SteppedLink] = {}         # by shard id, the latest of each
        self.shards = [SteppedShard(f"s{slot}.0") for slot in range(NUM_SLOTS)]
        self.dead: list[SteppedShard] = []
        self.clients: list[Client] = []
        self.given_up: set[str] = set()
        config = RouterConfig(admission=AdmissionConfig(max_open_requests=6, max_queued_requests=100),
                              stream_window=WINDOW)
        self.service = InferenceService(ModelCard("m", MAX_MODEL_LEN, 0), tokenizer, config, SCHEDULER,
                                        RouterMetrics(), clock)
        self._epoch: Epoch | None = None

    def new_link(self, *arguments: Any, security: LinkSecurity) -> SteppedLink:
        """Stand for ShardLinkClient(...)."""
        link = SteppedLink(*arguments)
        link.shard = next(shard for shard in self.shards if shard.shard_id == link.member.shard_id)
        self.links[link.member.shard_id] = link
        return link

    def shard_of(self, slot: int) -> SteppedShard:
        return self.shards[slot % NUM_SLOTS]

    def link_of(self, slot: int) -> SteppedLink | None:
        """Return the latest link to a shard; None before it was in an epoch."""
        return self.links.get(self.shard_of(slot).shard_id)

    # What may happen.

    def ask(self, requests: Sequence[GenerationRequest]) -> None:
        client = Client(requests)
        client.task = asyncio.create_task(client.run(self.service))
        self.clients.append(client)

    def cancel(self, index: int) -> None:
        if self.clients:
            task = self.clients[index % len(self.clients)].task
            assert task is not None
            task.cancel()

    def begin_epoch(self, slots: int) -> None:
        """With the shards in the places that the bits say."""
        shards = [shard for slot, shard in enumerate(self.shards) if slots >> slot & 1]
        if shards:
            number = self._epoch.number + 1 if self._epoch else 1
            self._epoch = Epoch(number, tuple(member(1, shard.shard_id) for shard in shards),
                                Placement(len(shards), ()), "", even_shares(len(shards)))
            self.service.set_epoch(self._epoch)

    def have_leave(self, slots: int) -> None:
        if self._epoch is not None:
            self._epoch = replace(self._epoch, revision=self._epoch.revision + 1)
            leaving = [shard.shard_id for slot, shard in enumerate(self.shards) if slots >> slot & 1]
            self.service.set_epoch(self._epoch, leaving)

    def tell_old_epoch(self) -> None:
        if self._epoch is not None and self._epoch.number > 1:
            self.service.set_epoch(replace(self._epoch, number=self._epoch.number - 1, members=self._epoch.members[:1],
                                           shares=even_shares(1)))

    def kill(self, slot: int) -> None:
        """Its router learns it by notice_break(), or by an epoch without it."""
        dead = self.shard_of(slot)
        dead.is_alive = False
        self.dead.append(dead)
        self.shards[self.shards.index(dead)] = SteppedShard(f"s{slot % NUM_SLOTS}.{len(self.dead)}")

    def give_up(self, slot: int) -> None:
        """Have a shard cancel what it has, of itself; every sequence once at most."""
        engine = self.shard_of(slot).engine
        for sequence_id in set(engine._router_of) - self.given_up:
            self.given_up.add(sequence_id)
            engine.cancel(engine._router_of[sequence_id], sequence_id)

    def notice_breaks(self) -> None:
        for link in list(self.links.values()):
            if link.stream is not None and (link.stream.is_over or not link.shard.is_alive):
                link.notice_break()

    async def work(self) -> None:
        """Have everything that can go on go on for a moment."""
        self.notice_breaks()
        for slot, shard in enumerate(self.shards):
            link = self.link_of(slot)
            if link is not None:
                link.connect()
                link.send()
            await shard.begin_step()
            await shard.end_step()
            if link is not None:
                link.receive()
        await turns()

    async def finish(self) -> None:
        """With all shards in the last epoch, everybody who was not cancelled gets the whole answer."""
        for shard in self.shards:
            await shard.end_step()
        self.begin_epoch(ALL)
        for _ in range(1000):
            if all(client.task is not None and client.task.done() for client in self.clients):
                break
            await self.work()
        for _ in range(3):          # cancellations on their way
            await self.work()

    def check(self) -> None:
        """Nothing is left of anybody."""
        assert all(client.task is not None and client.task.done() for client in self.clients), "somebody waits for ever"
        links, service = self.service._links, self.service
        assert service._open == links._placed == service._unplaced == {} and len(service._journal) == 0
        assert not any(links._num_open_tokens.values()) and not any(links._num_placed.values())
        assert service._admission.num_open == service._admission.num_queued == 0
        ends = service._metrics.requests.ended.labels
        assert ends(FinishReason.FAILED.value)._value.get() == 0
        for shard in self.shards:
            shard.check_empty()

    async def close(self) -> None:
        await self.service.close()
        for shard in (*self.shards, *self.dead):
            await shard.stop()
