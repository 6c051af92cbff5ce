"""Members of one process, each with a real engine, runner and caches, that take over each other's blocks over gRPC.
Each computes by itself: to their exchanges they are one group."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import torch

from cluster.shard.block_exchange import BlockExchange
from model.args import read_model_args
from model.dispatch.dispatcher import LocalDispatcher
from model.kernels.protocol import Kernels
from model.memory import kv_block_bytes, state_slot_bytes
from model.placement import Placement
from model.runner import Runner
from model.step import SamplingSpec, StepHeader, StepPlan, StepResult
from model.transport.address import EndpointAddress, Secret
from model.weights import load_decoder
from serving.config import SchedulerConfig
from serving.engine.agreement import Agreement
from serving.engine.engine import Engine
from serving.engine.request import Submission, TokenEvent
from serving.engine.scheduler import Scheduler
from serving.link.epoch import Epoch, Member
from serving.link.server import ShardLinkServer, start_link_server
from tests.placements import even_shares
from tests.serving.link.fake_link import FACTS, Changed, clock

BLOCK = 16


class LoneExecutor:
    """Steps alone, on a thread of its own."""

    prepared_revision = 0

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.thread = ThreadPoolExecutor(1, "model")

    async def agree(self, header: StepHeader, plan: StepPlan) -> tuple[Agreement, StepResult | None]:
        await asyncio.sleep(0)
        return Agreement((header,)), None

    async def execute(self, plan: StepPlan, agreement: Agreement) -> StepResult:
        return await asyncio.get_running_loop().run_in_executor(
            self.thread, self.runner.execute, plan, agreement.num_tokens_of_member)

    async def prepare(self, submission: Submission) -> None: ...
    async def switch(self, revision: int) -> None: ...


class LoneMember:
    """`events` by request. Use `started`."""

    def __init__(self, folder: Path, dtype: torch.dtype, kernels: Kernels, shard_id: str, num_blocks: int) -> None:
        args = read_model_args(folder)
        holders = tuple(((0,),) * args.num_experts for _ in range(args.num_moe_layers))
        placement, num_slots = Placement(1, holders), 12 if args.linear_layers else 0
        decoder, _ = load_decoder(folder, args, dtype, kernels, placement, 0)
        self.runner = Runner(decoder, LocalDispatcher(kernels, placement), num_blocks, BLOCK,
                             num_state_slots=num_slots)
        scheduler = Scheduler(SchedulerConfig(block_size=BLOCK, max_batch_tokens=64, max_running_requests=8),
                              num_blocks, 256, num_slots, kv_block_bytes(args, BLOCK, dtype.itemsize),
                              state_slot_bytes(args, dtype.itemsize))
        self.executor = LoneExecutor(self.runner)
        self.engine = Engine(scheduler, self.executor, 1, clock, self._ring, self._deliver)
        self.address = EndpointAddress(secrets.token_hex(16), "127.0.0.1", 1, "", Secret(secrets.token_hex(32)))
        self.exchange = BlockExchange(self.address)
        self.shard_id = shard_id
        self.events: dict[str, list[TokenEvent]] = {}
        self.changed = Changed()
        self.port = 0

    async def _ring(self, step_index: int) -> None: ...

    def _deliver(self, router_id: str, step_index: int, events: list[TokenEvent]) -> None:
        for event in events:
            self.events.setdefault(event.request_id, []).append(event)
        self.changed.set()

    @asynccontextmanager
    async def started(self) -> AsyncIterator[LoneMember]:
        server, self.port = await start_link_server(ShardLinkServer(self.shard_id, clock), "127.0.0.1:0",
                                                    blocks=self.exchange.sender, own=self.address)
        task = asyncio.create_task(self.engine.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.wait([task])
            await server.stop(None)
            self.exchange.close()
            self.executor.thread.shutdown()

    @property
    def member(self) -> Member:
        return Member(self.shard_id, "default", self.shard_id, self.shard_id, f"127.0.0.1:{self.port}", FACTS,
                      endpoint=self.address, digest="model")

    def submit(self, request_id: str, prompt: Sequence[int], num_output: int, journal: Sequence[int] = (),
               source: str = "") -> None:
        self.engine.submit("r", Submission(request_id, tuple(prompt), SamplingSpec(temperature=0.0), num_output,
                                           journal_token_ids=tuple(journal), source_shard_id=source))

    async def outcome(self, request_id: str) -> tuple[tuple[int, ...], int]:
        """Wait for the end of a request -> its tokens, and how many of those before them were received."""
        await self.changed.until(lambda: any(event.finish_reason for event in self.events.get(request_id, ())))
        events = self.events[request_id]
        return tuple(token for event in events for token in event.token_ids), events[0].num_received_tokens

    async def answer(self, request_id: str, prompt: Sequence[int], num_output: int, journal: Sequence[int] = (),
                     source: str = "") -> tuple[tuple[int, ...], int]:
        self.submit(request_id, prompt, num_output, journal, source)
        return await self.outcome(request_id)

    def is_empty(self) -> bool:
        """Nothing is held: neither by sequences nor by transfers."""
        scheduler = self.engine.scheduler
        return (not self.engine.transfers._held and scheduler.blocks.num_free == scheduler.blocks.num_blocks
                and scheduler.states.num_free == scheduler.states.num_slots)


def meet(*members: LoneMember, epoch_number: int = 1) -> None:
    """Let them know each other."""
    epoch = Epoch(epoch_number, tuple(one.member for one in members), Placement(len(members), ()), "",
                  even_shares(len(members)))
    for one in members:
        one.exchange.enter(epoch, one.shard_id, one.engine, one.runner.caches)


@asynccontextmanager
async def lone_members(folder: Path, dtype: torch.dtype, kernels: Sequence[Kernels], num_blocks: int = 60
                       ) -> AsyncIterator[list[LoneMember]]:
    """One for each of the kernels, s0, s1, ..., who know each other."""
    async with AsyncExitStack() as stack:
        members = [await stack.enter_async_context(
            LoneMember(folder, dtype, some, f"s{index}", num_blocks).started()) for index, some in enumerate(kernels)]
        meet(*members)
        yield members
