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
where all switch, before the step that it is about. Members that pause or sleep switch there too.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from model.step import ScheduledRequest, StepHeader, StepPlan, StepResult
from serving.engine.agreement import Agreement
from serving.engine.request import Request, Submission, TokenEvent
from serving.engine.scheduler import Scheduler

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

    @property
    def prepared_revision(self) -> int:
        """Return the placement that switch() would take; that of the steps when none waits. Call Engine.tell_prepared()
        when it has changed."""

    async def switch(self, revision: int) -> None:
        """Let the next steps use the prepared placement."""


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
        self._ring_tasks: set[asyncio.Task[None]] = set()
        self._run_task: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._wants_pause = False
        self._pause_changed = asyncio.Event()
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.revision = self.executor.prepared_revision     # of the placement that the steps use
        self._told_revision = self.revision                 # as prepared, in the last agreement
        self._step_index = 0                # the next agreement
        self._rung_step_index = -1          # the latest agreement that a peer is known to wait in
        self._is_awake = True               # the group goes on to the next agreement unasked
        self._is_group_paused = False
        self._is_resuming = False

    # Requests.

    def submit(self, router_id: str, submission: Submission) -> None:
        """Queue a sequence. Raises InvalidRequestError; ContextLengthError when it can never fit."""
        ended = self.scheduler.add(Request(submission, router_id, self._clock()))
        self._router_of[submission.request_id] = router_id
        self._queue([ended] if ended else [])
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """End a sequence and free its blocks now; what a step in flight still computes for it is dropped."""
        ended = self.scheduler.cancel(request_id)
        self._queue([ended] if ended else [])
        self._wake.set()

    def disconnect(self, router_id: str) -> None:
        """Cancel everything of a router that is gone. Nobody is left to be told."""
        for request_id in [request_id for request_id, owner in self._router_of.items() if owner == router_id]:
            self.scheduler.cancel(request_id)
            del self._router_of[request_id]
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

    async def pause(self) -> None:
        """Stop the whole group between two steps. Returns when no step runs and none will before resume()."""
        self._wants_pause = True
        self._wake.set()
        while self._run_task is not None and self._wants_pause and not self._is_group_paused:
            self._pause_changed.clear()
            await self._pause_changed.wait()

    def resume(self) -> None:
        """Take the wish to pause back; the group goes on when no other member wants to pause."""
        self._wants_pause = False
        self._is_resuming = self._is_group_paused
        self._wake.set()
        self._pause_changed.set()

    def change_epoch(self, epoch_number: int, executor: Executor, ring_peers: Callable[[int], Awaitable[None]]) -> None:
        """Go on with another group, between two runs. Sequences keep their tokens and their KV blocks."""
        if self._run_task is not None:
            raise RuntimeError(f"epoch {self.epoch_number} still runs: end it with stop() before epoch {epoch_number}")
        self.epoch_number, self.executor, self._ring_peers = epoch_number, executor, ring_peers
        self._begin_epoch()

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
            self._pause_changed.set()
            for ring_task in self._ring_tasks:
                ring_task.cancel()

    async def stop(self) -> None:
        """End run() between two steps and wait for that; an agreement under way ends first. pause() a live group
        before, or the others wait for this member until their timeout."""
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
            self._deliver(self.scheduler.apply(plan, result), plan.step_index)
            self._measure(plan, result, self._clock() - began_s)

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
        if self._is_awake or self._is_resuming or self._rung_step_index >= self._step_index:
            return True
        return not self._is_group_paused and (self._wants_pause or self.scheduler.has_work()
                                              or self.executor.prepared_revision != self._told_revision)

    async def _sleep(self) -> None:
        """Wait until something happens to this member, or the deadline of a sequence passes that cannot run."""
        deadline_s = self.scheduler.next_deadline_s()
        with suppress(TimeoutError):
            async with asyncio.timeout(None if deadline_s is None else deadline_s - self._clock()):
                await self._wake.wait()

    def _plan(self) -> StepPlan:
        requests: tuple[ScheduledRequest, ...] = () if self._wants_pause else self.scheduler.schedule()
        return StepPlan(self.epoch_number, self._step_index, requests)

    async def _agree(self, plan: StepPlan) -> tuple[Agreement, StepResult | None]:
        """Enter the agreement and learn from it whether the group steps, pauses or falls asleep. A step at once is made
        by then."""
        if not self._is_awake and self._rung_step_index < plan.step_index:
            ring_task = asyncio.create_task(self._ring(plan.step_index))
            self._ring_tasks.add(ring_task)
            ring_task.add_done_callback(self._ring_tasks.discard)
        self._told_revision = self.executor.prepared_revision
        header = StepHeader(plan.epoch_number, plan.step_index, plan.num_tokens, self._wants_pause, self._told_revision)
        agreement, result = await self.executor.agree(header, plan)
        self._step_index += 1
        self._is_group_paused, self._is_awake, self._is_resuming = agreement.is_pause, agreement.is_step, False
        self._pause_changed.set()
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
            if event.finish_reason is not None:
                del self._router_of[event.request_id]

    def _deliver(self, events: Iterable[TokenEvent], step_index: int) -> None:
        """Hand over these events and those that gathered since, one call for each router."""
        self._queue(events)
        outbox, self._outbox = self._outbox, {}
        for router_id, router_events in outbox.items():
            self._deliver_to_router(router_id, step_index, router_events)

    def _measure(self, plan: StepPlan, result: StepResult, step_s: float) -> None:
        self.num_steps += 1
        self.num_tokens_computed += plan.num_tokens
        self.num_expert_rows += result.stats.num_expert_rows
        if plan.requests:
            self._rate.add(plan.num_tokens, step_s)
