"""The step loop of one shard, in lockstep with the others of its group.

Steps are numbered within an epoch. Before each, all members agree: an all-gather of headers, in which everybody takes
part, if only with zero tokens. When nobody has tokens the group sleeps: nobody enters the next agreement, number k, and
nothing runs. The member that then gets work enters agreement k and rings its peers with that number. A peer asleep
before k joins; one in k or past it need not do anything; one that is still leaving agreement k - 1 remembers the
number and does not fall asleep. So no order of rings, submissions and steps can lose a wake-up, and late or repeated
rings do no harm.

An epoch begins awake: its agreement 0 is the barrier after which every peer is known to hear rings.

The placement may change within an epoch. Each member prepares the next revision in the background and tells so in its
headers, in an idle group by entering one agreement for it. The agreement in which all have told the same revision is
where all switch, before the step that it is about. Members that then sleep switch there too.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from model.step import StepHeader, StepPlan, StepResult
from serving.engine.agreement import Agreement
from serving.engine.block_transfers import BlockTransfers
from serving.engine.request import FinishReason, Request, Submission, TokenEvent
from serving.engine.scheduler import Scheduler
from serving.engine.sequence_traces import SequenceTraces
from serving.engine.transfer_choice import PrefillRate

logger = logging.getLogger(__name__)

RATE_WINDOW_S = 5.0     # of work time, over which the speed is measured


@dataclass(frozen=True, slots=True)
class ShardLoad:
    """Says how busy a shard is, for the router's choice and the metrics."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    tokens_per_s: float = 0.0       # computed over the last seconds of work; 0 when unknown
    num_preemptions: int = 0        # since the shard started
    step_s: float = 0.0             # mean length of the recent steps; 0 when unknown
    state_slots_free: int = 0       # snapshots that nobody reads included
    state_slots_total: int = 0      # 0: no layer keeps a state
    num_snapshots: int = 0          # of states
    kv_block_bytes: int = 0         # of one block; 0 when unknown
    num_cached_tokens: int = 0      # that the prefix cache served, since the shard started

    @property
    def num_sequences(self) -> int:
        return self.num_running + self.num_waiting


class Executor(Protocol):
    """Runs steps on the group, elsewhere: others have their turn on the event loop while one runs. Raises GroupError
    when the group is broken; then the epoch is over."""

    async def agree(self, header: StepHeader, plan: StepPlan) -> tuple[Agreement, StepResult | None]:
        """Return the agreement when all members have entered and, where it is a step at once, what execute() would: to
        hand one thing after the other to another thread would cost a part of every step."""

    async def execute(self, plan: StepPlan, agreement: Agreement) -> StepResult:
        """Run the agreed step; an empty plan takes part with zero rows."""

    async def prepare(self, submission: Submission) -> None:
        """Make ready what a request with a grammar needs, beside the steps. Raises what ends that request only."""

    @property
    def prepared_revision(self) -> int:
        """Return the placement that switch() would take; that of the steps when none waits. Call Engine.tell_prepared()
        when it has changed."""

    async def switch(self, revision: int) -> None:
        """Let the next steps use the prepared placement."""


class BlockSource(Protocol):
    """Takes over KV blocks from other members, into the prefix cache of an engine."""

    async def receive(self, shard_id: str, names: tuple[bytes, ...], engine: Engine) -> int:
        """Return the tokens whose blocks the member has sent: 0 where computing them is done sooner, or all went wrong.
        Raises nothing."""


class WorkRate:
    """Counts tokens computed and steps made per second of work, over the last RATE_WINDOW_S of it."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque()
        self._num_tokens = 0
        self._work_s = 0.0

    def add(self, num_tokens: int, step_s: float) -> None:
        self._steps.append((num_tokens, step_s))
        self._num_tokens += num_tokens
        self._work_s += step_s
        while len(self._steps) > 1 and self._work_s - self._steps[0][1] >= RATE_WINDOW_S:
            old_tokens, old_s = self._steps.popleft()
            self._num_tokens -= old_tokens
            self._work_s -= old_s

    @property
    def tokens_per_s(self) -> float:
        return self._num_tokens / self._work_s if self._work_s > 0 else 0.0

    @property
    def step_s(self) -> float:
        return self._work_s / len(self._steps) if self._steps else 0.0


class Engine:
    """One shard's requests, stepped through its group. All methods are called from one event loop, at any moment.

    `ring_peers(step_index)` tells every other member that this one waits in that agreement. `deliver(router_id,
    step_index, events)` hands over what a step did, once for each router concerned.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, epoch_number: int, clock: Callable[[], float],
                 ring_peers: Callable[[int], Awaitable[None]],
                 deliver: Callable[[str, int, list[TokenEvent]], None]) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.transfers = BlockTransfers(scheduler.blocks, scheduler.states)
        self.prefill_rate = PrefillRate()
        self.block_source: BlockSource | None = None    # set by whoever knows the other members
        self.traces = SequenceTraces(None, clock)       # replaced by whoever traces requests
        self.epoch_number = epoch_number
        self.num_steps = 0                  # steps in which anybody computed anything
        self.num_tokens_computed = 0        # by this member
        self.num_expert_rows = 0            # (row, expert) pairs computed here, for anybody
        self._clock = clock
        self._ring_peers = ring_peers
        self._deliver_to_router = deliver
        self._rate = WorkRate()
        self._router_of: dict[str, str] = {}                # of every open request
        self._outbox: dict[str, list[TokenEvent]] = {}      # by router, until the loop comes by
        self._wake = asyncio.Event()
        self._preparations: dict[str, asyncio.Task[None]] = {}      # by request
        self._ring_tasks: set[asyncio.Task[None]] = set()
        self._run_task: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.revision = self.executor.prepared_revision     # of the placement that the steps use
        self._told_revision = self.revision                 # as prepared, in the last agreement
        self._step_index = 0                # the next agreement
        self._rung_step_index = -1          # the latest agreement that a peer is known to wait in
        self._is_awake = True               # the group goes on to the next agreement unasked

    # Requests.

    def submit(self, router_id: str, submission: Submission) -> None:
        """Queue a sequence. Raises InvalidRequestError; ContextLengthError when it can never fit."""
        is_ready = not submission.sampling.grammar and not submission.source_shard_id
        request = Request(submission, router_id, self._clock(), is_ready=is_ready)
        ended = self.scheduler.add(request)
        self._router_of[submission.request_id] = router_id
        self.traces.begin(submission)
        if ended is None and not request.is_ready:
            self._preparations[submission.request_id] = asyncio.create_task(self._prepare(request))
        self._queue([ended] if ended else [])
        self._wake.set()

    def cancel(self, router_id: str, request_id: str) -> None:
        """End a sequence of this router and free its blocks now; what a step in flight still computes for it is
        dropped. Sequences of other routers are not its to end."""
        if self._router_of.get(request_id) != router_id:
            return
        ended = self.scheduler.cancel(request_id)
        self._queue([ended] if ended else [])
        self._wake.set()

    def disconnect(self, router_id: str) -> None:
        """Cancel everything of a router that is gone. Nobody is left to be told."""
        for request_id in [request_id for request_id, owner in self._router_of.items() if owner == router_id]:
            self.scheduler.cancel(request_id)
            self._forget(request_id, FinishReason.CANCELLED)
        self._outbox.pop(router_id, None)
        self.hold(router_id, False)

    def hold(self, router_id: str, held: bool) -> None:
        """Do not schedule the sequences of a router that does not acknowledge, until it does."""
        self.scheduler.hold(router_id, held)
        self._wake.set()

    def load(self) -> ShardLoad:
        blocks, states = self.scheduler.blocks, self.scheduler.states
        return ShardLoad(
            num_running=self.scheduler.num_running, num_waiting=self.scheduler.num_waiting,
            kv_blocks_free=blocks.num_free, kv_blocks_total=blocks.num_blocks, tokens_per_s=self._rate.tokens_per_s,
            num_preemptions=self.scheduler.num_preemptions, step_s=self._rate.step_s,
            state_slots_free=states.num_free, state_slots_total=states.num_slots, num_snapshots=states.num_snapshots,
            kv_block_bytes=self.scheduler.room.block_bytes, num_cached_tokens=self.scheduler.num_cached_tokens)

    # The group.

    def ring(self, epoch_number: int, step_index: int) -> None:
        """Note that a peer waits in the agreement of that step. Rings of another epoch mean nothing here."""
        if epoch_number == self.epoch_number:
            self._rung_step_index = max(self._rung_step_index, step_index)
            self._wake.set()

    def tell_prepared(self) -> None:
        """Enter an agreement, if need be, to say that the executor can switch to another revision."""
        self._wake.set()

    def change_epoch(self, epoch_number: int, executor: Executor, ring_peers: Callable[[int], Awaitable[None]]) -> None:
        """Go on with another group, between two runs. Sequences keep their tokens and their KV blocks."""
        if self._run_task is not None:
            raise RuntimeError(f"epoch {self.epoch_number} still runs: end it with stop() before epoch {epoch_number}")
        self.epoch_number, self.executor, self._ring_peers = epoch_number, executor, ring_peers
        self._begin_epoch()

    def resize(self, num_blocks: int) -> dict[int, int]:
        """Go on with another number of KV blocks, between two runs and transfers, and return the new number of every
        block whose content is kept. See Scheduler.resize."""
        assert self._run_task is None, "a step may use the blocks"
        new_number_of, ended = self.scheduler.resize(num_blocks)
        self._queue(ended)
        return new_number_of

    async def run(self) -> None:
        """Step until stop(). Raises what the executor raises, with everything as it was before the failed step."""
        if self._run_task is not None:
            raise RuntimeError("the engine runs already: one run() at a time")
        self._run_task = asyncio.current_task()
        self._is_stopping = False
        try:
            while not self._is_stopping:
                await self.step()       # what it delivered is sent while the next one runs
        finally:
            self._run_task = None
            for ring_task in self._ring_tasks:
                ring_task.cancel()

    async def stop(self) -> None:
        """End run() between two steps and wait for that; an agreement under way ends first: abort the
        group before, or it may wait for a member that will never come."""
        self._is_stopping = True
        self._wake.set()
        if self._run_task is not None:
            await asyncio.wait([self._run_task])

    async def step(self) -> None:
        """Run one agreement of the group and, if anybody has tokens, one forward."""
        await self._sleep_until_needed()
        if self._is_stopping:
            return
        began_s = self._clock()
        plan = self._plan()
        agreement, result = await self._agree(plan)
        await self._switch_if_all_can(agreement)
        if self._is_awake:
            result = result or await self.executor.execute(plan, agreement)
            self.traces.stepped(plan, result, began_s)
            self._deliver(self.scheduler.apply(plan, result), plan.step_index)
            self._measure(plan, agreement, result, self._clock() - began_s)

    # The verbs of a step.

    async def _sleep_until_needed(self) -> None:
        while not self._is_stopping:
            self._deliver(self.scheduler.expire(self._clock()), self._step_index)
            if self._is_needed():
                return
            self._wake.clear()      # all that wakes has left its mark above, so nothing is lost here
            await self._sleep()

    def _is_needed(self) -> bool:
        """Return whether to enter the next agreement."""
        return (self._is_awake or self._rung_step_index >= self._step_index or self.scheduler.has_work()
                or self.executor.prepared_revision != self._told_revision)

    async def _sleep(self) -> None:
        """Wait until something happens to this member, or the deadline of a sequence passes that cannot run."""
        deadline_s = self.scheduler.next_deadline_s()
        with suppress(TimeoutError):
            async with asyncio.timeout(None if deadline_s is None else deadline_s - self._clock()):
                await self._wake.wait()

    def _plan(self) -> StepPlan:
        return StepPlan(self.epoch_number, self._step_index, self.scheduler.schedule(self._clock()))

    async def _agree(self, plan: StepPlan) -> tuple[Agreement, StepResult | None]:
        """Enter the agreement and learn from it whether the group steps or falls asleep. A step at once is made
        by then."""
        if not self._is_awake and self._rung_step_index < plan.step_index:
            ring_task = asyncio.create_task(self._ring(plan.step_index))
            self._ring_tasks.add(ring_task)
            ring_task.add_done_callback(self._ring_tasks.discard)
        self._told_revision = self.executor.prepared_revision
        header = StepHeader(plan.epoch_number, plan.step_index, plan.num_tokens, self._told_revision,
                            plan.num_prompt_tokens)
        agreement, result = await self.executor.agree(header, plan)
        if self.scheduler.prefill_budget is not None:
            self.scheduler.prefill_budget.hear(agreement, header)
        self._step_index += 1
        self._is_awake = agreement.is_step
        return agreement, result

    async def _switch_if_all_can(self, agreement: Agreement) -> None:
        revision = agreement.revision_after(self.revision)
        if revision != self.revision:
            await self.executor.switch(revision)
            logger.info("revision_switched epoch=%d revision=%d step_index=%d", self.epoch_number, revision,
                        self._step_index - 1)
            self.revision = revision

    async def _ring(self, step_index: int) -> None:
        try:
            await self._ring_peers(step_index)
        except Exception:       # the agreement's own timeout decides whether the group is broken
            logger.warning("ring_failed epoch=%d step_index=%d", self.epoch_number, step_index, exc_info=True)

    def _queue(self, events: Iterable[TokenEvent]) -> None:
        for event in events:
            router_id = self._router_of[event.request_id]
            self._outbox.setdefault(router_id, []).append(event)
            self.traces.add(event)
            if event.finish_reason is not None:
                self._forget(event.request_id, event.finish_reason)

    def _forget(self, request_id: str, reason: FinishReason) -> None:
        del self._router_of[request_id]
        self.traces.end(request_id, reason.value)
        if preparation := self._preparations.pop(request_id, None):
            preparation.cancel()

    async def _prepare(self, request: Request) -> None:
        """Let a request be scheduled when the executor is ready for it. A failure ends that request only."""
        try:
            if request.submission.sampling.grammar:
                await self.executor.prepare(request.submission)
            await self._receive_blocks(request)
        except Exception as error:
            logger.warning("request_not_prepared request_id=%s error=%s", request.request_id, error)
            ended = self.scheduler.fail(request, str(error))
            self._preparations.pop(request.request_id, None)
            self._queue([ended] if ended else [])
        else:
            self._preparations.pop(request.request_id, None)
            self.scheduler.set_ready(request)
        self._wake.set()

    async def _receive_blocks(self, request: Request) -> None:
        """Have the blocks in the prefix cache that a member is said to have, as far as that is worth it."""
        shard_id, names = request.submission.source_shard_id, self.scheduler.reusable_names(request)
        if shard_id and names and self.block_source is not None:
            request.num_received_tokens = await self.block_source.receive(shard_id, names, self)

    def _deliver(self, events: Iterable[TokenEvent], step_index: int) -> None:
        """Hand over these events and those that gathered since, one call for each router."""
        self._queue(events)
        outbox, self._outbox = self._outbox, {}
        for router_id, router_events in outbox.items():
            self._deliver_to_router(router_id, step_index, router_events)

    def _measure(self, plan: StepPlan, agreement: Agreement, result: StepResult, step_s: float) -> None:
        if self.scheduler.prefill_budget is not None:
            self.scheduler.prefill_budget.measure(agreement, step_s)
        self.num_steps += 1
        self.num_tokens_computed += plan.num_tokens
        self.num_expert_rows += result.stats.num_expert_rows
        if plan.requests:
            self._rate.add(plan.num_tokens, step_s)
            if (num_prefilled := plan.num_tokens - len(plan.requests)) > 0:
                self.prefill_rate.add(num_prefilled, step_s)
