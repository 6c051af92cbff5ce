"""Whole shards behind real links for the tests of the router: real engines and schedulers, and a model that is a
function of what the KV cache holds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from model.placement import Placement
from model.step import SamplingSpec, StepPlan, StepResult
from serving.config import SchedulerConfig
from serving.engine.agreement import Agreement
from serving.engine.engine import Engine
from serving.engine.request import Submission
from serving.engine.scheduler import Scheduler
from serving.link.channel_options import Options
from serving.link.epoch import Epoch, Member, RequestShare
from serving.link.server import ShardLinkServer, start_link_server
from serving.router.generation import GenerationDelta, GenerationRequest
from serving.router.service import InferenceService
from serving.sampling_params import MAX_COUNT, SamplingParams
from serving.tenants.key import Tenant
from tests.placements import even_shares
from tests.serving.engine.fake_group import Expected, FakeExecutor, Group, KvModel, expected
from tests.serving.link.fake_link import Changed, clock, member

BLOCK = 16
SCHEDULER = SchedulerConfig(block_size=BLOCK)
PROMPT = tuple(range(10, 30))
MAX_MODEL_LEN = 2000


async def until(condition: Callable[[], bool]) -> None:
    """For what announces itself to nobody."""
    while not condition():      # noqa: ASYNC110
        await asyncio.sleep(0)


class SteppedExecutor(FakeExecutor):
    """Runs as many steps as the test allows: None for any number."""

    def __init__(self) -> None:
        super().__init__(Group(num_members=1), 0, KvModel(BLOCK))
        self.num_allowed: int | None = None
        self.changed = Changed()

    def allow(self, num_steps: int | None) -> None:
        self.num_allowed = num_steps
        self.changed.set()

    async def execute(self, plan: StepPlan, agreement: Agreement) -> StepResult:
        await self.changed.until(lambda: self.num_allowed != 0)
        if self.num_allowed is not None:
            self.num_allowed -= 1
        return await super().execute(plan, agreement)


class Shard:
    """A whole shard whose group is itself. Several of them compute the same, so each can continue for the others."""

    def __init__(self, num_blocks: int = 200, shard_id: str = "s0") -> None:
        self.executor = SteppedExecutor()
        self.servicer = ShardLinkServer(shard_id, clock)
        self.scheduler = Scheduler(SCHEDULER, num_blocks, MAX_MODEL_LEN)
        self.engine = Engine(self.scheduler, self.executor, 1, clock, self.ring_nobody, self.deliver)
        self.changed = Changed()
        self.server: grpc.aio.Server | None = None
        self.port = 0

    async def ring_nobody(self, step_index: int) -> None:
        pass

    def deliver(self, router_id: str, step_index: int, events: Any) -> None:
        self.servicer.deliver(router_id, step_index, events)
        self.changed.set()

    async def start(self, options: Options | None = None) -> None:
        self.server, self.port = await start_link_server(self.servicer, "127.0.0.1:0", options)
        self.servicer.serve(self.engine, MAX_COUNT)
        self._task = asyncio.create_task(self.engine.run())

    async def stop(self) -> None:
        self.servicer.stop("the test ends")
        assert self.server is not None
        await self.server.stop(None)
        self._task.cancel()
        await asyncio.wait([self._task])

    async def die(self) -> None:
        assert self.server is not None
        await self.server.stop(None)

    @property
    def num_open(self) -> int:
        return self.scheduler.num_running + self.scheduler.num_waiting

    async def until_empty(self) -> None:
        """Every sequence is out of the engine and its blocks are free."""
        await until(lambda: not self.num_open and self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks)


def epoch_with(number: int, *shards: Shard | Member, shares: tuple[float, ...] = ()) -> Epoch:
    """Of these shards; shares of the requests are even unless given."""
    members = tuple(shard if isinstance(shard, Member) else member(shard.port, shard.servicer._shard_id)
                    for shard in shards)
    requests = tuple(RequestShare(share, 100) for share in shares) or even_shares(len(shards))
    return Epoch(number, members, Placement(len(shards), ()), "", requests)


async def until_streaming(service: InferenceService, num_sequences: int) -> None:
    """So many sequences are open, and the router has tokens of each: only then is their pause one."""
    await until(lambda: len(service._open) == num_sequences
                and all(choice.num_tokens for _, choice in service._open.values()))


NOBODY = Tenant("default")


def ask(prompt: tuple[int, ...] = PROMPT, deadline_s: float | None = None, tenant: Tenant = NOBODY,
        **params: Any) -> GenerationRequest:
    defaults: dict[str, Any] = {"seed": 7, "ignore_eos": True, "max_tokens": 12}
    return GenerationRequest("id", "m", prompt, SamplingParams(**{**defaults, **params}), tenant,
                             deadline_s)


def truth(max_tokens: int = 12, seed: int = 7, prompt: tuple[int, ...] = PROMPT, **fields: Any) -> Expected:
    return expected(Submission("x", prompt, SamplingSpec(seed=seed), max_tokens, **fields))


async def collect(service: InferenceService, request: GenerationRequest) -> list[GenerationDelta]:
    return [delta async for _, delta in service.generate([request])]


def token_ids(deltas: list[GenerationDelta], choice: int = 0) -> tuple[int, ...]:
    return tuple(token_id for delta in deltas if delta.choice == choice for token_id in delta.token_ids)


def text(deltas: list[GenerationDelta], choice: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.choice == choice)


def counter(service: InferenceService, name: str) -> float:
    for line in service._metrics.render()[0].decode().splitlines():
        if line.startswith(f"moesaic:{name} "):
            return float(line.split()[-1])
    raise AssertionError(f"no metric {name}")


Start = Callable[..., Awaitable[tuple[InferenceService, list[Shard]]]]
