"""Several members of a group in one event loop: real engines and schedulers, fake executors."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from model.errors import GroupError
from model.step import SamplingSpec, StepPlan, StepResult
from serving.config import SchedulerConfig
from serving.engine.engine import Engine
from serving.engine.request import FinishReason, Submission, TokenEvent
from serving.engine.scheduler import Scheduler
from tests.serving.engine.fake_group import FakeExecutor, Group, KvModel, check_blocks, expected

BLOCK = 4
MANY_TURNS = 20_000      # of the event loop: more than any of these tests takes, unless it is stuck


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn; nothing here waits for time or I/O, so what has not come after so many turns never comes."""
    for _ in range(MANY_TURNS):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("stuck: a wake-up was lost")


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


@dataclass
class FakeClock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


class SlowModel(KvModel):
    """Takes half a second for a step."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(BLOCK)
        self.clock = clock

    def run(self, plan: StepPlan) -> StepResult:
        self.clock.now_s += 0.5
        return super().run(plan)


def submission(request_id: str, num_prompt: int = 5, max_tokens: int = 4, **fields: object) -> Submission:
    base = Submission(request_id, tuple(range(1, num_prompt + 1)), SamplingSpec(seed=7), max_tokens)
    return replace(base, **fields)          # type: ignore[arg-type]


class Shard:
    """One member: an engine with a fake executor, and what it has delivered."""

    def __init__(self, cluster: Cluster, rank: int, num_blocks: int) -> None:
        config = SchedulerConfig.model_construct(max_batch_tokens=16, max_running_requests=4, block_size=BLOCK,
                                                 prefix_caching=True)
        self.cluster = cluster
        self.rank = rank
        self.model = KvModel(BLOCK)
        self.executor = FakeExecutor(cluster.group, rank, self.model)
        self.scheduler = Scheduler(config, num_blocks, max_model_len=1000)
        self.deliveries: list[tuple[str, int, list[TokenEvent]]] = []
        self.accepted: dict[str, Submission] = {}
        self.num_rings = 0
        self.engine = Engine(self.scheduler, self.executor, cluster.group.epoch_number, cluster.clock, self._ring_peers,
                             self._deliver)

    def _deliver(self, router_id: str, step_index: int, events: list[TokenEvent]) -> None:
        assert events
        self.deliveries.append((router_id, step_index, events))

    async def _ring_peers(self, step_index: int) -> None:
        self.num_rings += 1
        await asyncio.gather(*(self._ring(shard, step_index) for shard in self.cluster.shards if shard is not self))

    async def _ring(self, shard: Shard, step_index: int) -> None:
        epoch_number = self.engine.epoch_number
        await self.cluster.group.delay()
        shard.engine.ring(epoch_number, step_index)

    def submit(self, new: Submission, router_id: str = "r") -> None:
        self.engine.submit(router_id, new)
        self.accepted[new.request_id] = new

    def prepare(self, revision: int) -> None:
        self.executor.prepared_revision = revision
        self.engine.tell_prepared()

    def events(self, request_id: str) -> list[TokenEvent]:
        return [event for _, _, events in self.deliveries for event in events if event.request_id == request_id]

    def has_ended(self, request_id: str) -> bool:
        return any(event.finish_reason is not None for event in self.events(request_id))

    def check(self, request_id: str) -> FinishReason:
        """It ended exactly once, with the tokens it has alone."""
        events, want = self.events(request_id), expected(self.accepted[request_id])
        token_ids = tuple(token_id for event in events for token_id in event.token_ids)
        reason = events[-1].finish_reason
        assert reason is not None and [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert (token_ids, reason) == (want.token_ids, want.finish_reason)
        assert token_ids == want.token_ids[:len(token_ids)]
        return reason


class Cluster:
    """Several members in one event loop."""

    def __init__(self, num_members: int = 1, num_blocks: int = 64, seed: int = 0, max_delay: int = 0) -> None:
        self.clock = FakeClock()
        self.group = Group(num_members, rng=random.Random(seed), max_delay=max_delay)
        self.shards: list[Shard] = []
        self.shards += [Shard(self, rank, num_blocks) for rank in range(num_members)]
        self.tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self.tasks = [asyncio.create_task(shard.engine.run()) for shard in self.shards]

    async def __aenter__(self) -> Cluster:
        self.start()
        await self.until_asleep()
        return self

    async def __aexit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed is not None:
            for task in self.tasks:
                task.cancel()
            return
        self.group.abort()
        await asyncio.gather(*(shard.engine.stop() for shard in self.shards))
        for ended in await asyncio.gather(*self.tasks, return_exceptions=True):
            assert ended is None or isinstance(ended, GroupError)

    async def until_asleep(self) -> None:
        """Every member has left the last agreement, and enters no other."""
        before = -1
        while before != self.group.num_agreements:
            before = self.group.num_agreements
            await turns(20 + 10 * self.group.max_delay)
            if not self.is_even():
                before = -1

    def switches(self) -> list[tuple[int, int]]:
        """(revision, step before which it came), the same on all members."""
        first, *others = (shard.executor.switches for shard in self.shards)
        assert all(other == first for other in others)
        assert {shard.engine.revision for shard in self.shards} == {first[-1][0] if first else 0}
        return first

    def is_even(self) -> bool:
        return self.group.num_agreements % self.group.num_members == 0

    async def until_ended(self) -> None:
        await until(lambda: all(shard.has_ended(name) for shard in self.shards for name in shard.accepted))

    def check(self) -> None:
        for shard in self.shards:
            for name in shard.accepted:
                shard.check(name)
            check_blocks(shard.scheduler.blocks, [])
