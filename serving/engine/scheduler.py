"""Decides which sequences compute how many tokens in the next step of one shard. Pure: time is an argument.

There is no prefill or decode phase: every sequence has known tokens (prompt, journal, output), num_computed_tokens of
them are in the KV cache, and it catches up under the step's token budget. schedule() only hands out KV blocks, which a
failed step need not undo; tokens, computed counts and shared prefixes are committed by apply(), after the step has
succeeded. So a step that failed is simply scheduled again.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator

from model.step import SampledToken, SamplingSpec, ScheduledRequest, StepPlan, StepResult
from serving.config import SchedulerConfig
from serving.engine.block_manager import BlockManager, block_hash
from serving.engine.cache_room import CacheRoom
from serving.engine.request import FinishReason, Request, RequestStatus, TokenEvent
from serving.engine.state_slots import SLOTS_WITH_SNAPSHOT, StateSlots, snapshot_positions
from serving.errors import InvalidRequestError

_END = {FinishReason.STOP: RequestStatus.FINISHED, FinishReason.LENGTH: RequestStatus.FINISHED,
        FinishReason.CANCELLED: RequestStatus.CANCELLED, FinishReason.FAILED: RequestStatus.FAILED}
_STARTED_BLOCKS = 1 << 15       # of a step's newcomers: to find and hold them takes some 5 ms, and all else waits


def _arrival(request: Request) -> int:
    return request.arrival_index


class Scheduler:
    """Continuous batching: decodes first, then chunks of prefill, then newcomers in order of arrival.

    A sequence gets the blocks of all its known tokens when it starts to run, and one more whenever it outgrows them.
    When none is free, the last arrived sequence gives its blocks back and is recomputed later; sequences whose router
    does not listen (held) give theirs first.
    """

    def __init__(self, config: SchedulerConfig, num_blocks: int, max_model_len: int, num_state_slots: int = 0,
                 block_bytes: int = 0, slot_bytes: int = 0) -> None:
        """`num_state_slots`: of models with layers that keep a state. `block_bytes` and `slot_bytes`, of one each, are
        told to whom they refuse."""
        if 0 < num_state_slots < SLOTS_WITH_SNAPSHOT:
            raise ValueError(f"num_state_slots={num_state_slots}: a sequence that starts from a snapshot needs "
                             f"{SLOTS_WITH_SNAPSHOT}; give more, or 0 for a model without states")
        self.config = config
        self.room = CacheRoom(max_model_len, num_blocks, config.block_size, block_bytes, slot_bytes)
        self.token_budget = config.max_batch_tokens     # of a step, at least 1; may change between two steps
        self.num_preemptions = 0
        self.num_cached_tokens = 0                      # not computed, as the prefix cache had them
        self.states = StateSlots(num_state_slots)
        self.blocks = BlockManager(num_blocks, config.block_size, config.prefix_caching, self.states.forget)
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []       # both in order of arrival
        self._running: list[Request] = []
        self._in_flight: dict[str, Request] = {}
        self._held_routers: set[str] = set()
        self._last_hashed: Request | None = None
        self._num_arrived = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def has_work(self) -> bool:
        """Return whether schedule() would return something."""
        return any(request.router_id not in self._held_routers for request in self._requests.values())

    def next_deadline_s(self) -> float | None:
        deadlines = (request.submission.deadline_s for request in self._requests.values())
        return min((deadline_s for deadline_s in deadlines if deadline_s is not None), default=None)

    # What may happen between any two calls, also while a step is in flight.

    def add(self, request: Request) -> TokenEvent | None:
        """Accept a request. Returns its last event when its journal leaves nothing to do. Raises InvalidRequestError,
        and ContextLengthError when it could never fit."""
        submission = request.submission
        self.room.check(submission)
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request_id {request.request_id!r} is already open here", fix="use a new one",
                                      param="request_id")
        request.arrival_index = self._num_arrived
        self._num_arrived += 1
        request.output_token_ids = list(submission.journal_token_ids)
        self._requests[request.request_id] = request
        bisect.insort(self._waiting, request, key=_arrival)
        reason = self._finish_reason(request) if submission.journal_token_ids else None
        if reason is None:
            return None
        request.advance(RequestStatus.RUNNING, "journal is complete")
        return self._end(request, TokenEvent(request.request_id, finish_reason=reason,
                                             stop_token_id=self._stop_token_id(request, reason)))

    def cancel(self, request_id: str) -> TokenEvent | None:
        """End a request now and free its blocks. None when it is not open: it may just have ended."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        return self._end(request, TokenEvent(request_id, finish_reason=FinishReason.CANCELLED))

    def expire(self, now_s: float) -> list[TokenEvent]:
        """Fail the requests whose deadline has passed."""
        late = [request for request in self._requests.values()
                if request.submission.deadline_s is not None and request.submission.deadline_s <= now_s]
        return [self._end(request, TokenEvent(
            request.request_id, finish_reason=FinishReason.FAILED,
            error=f"the deadline passed after {len(request.output_token_ids)} of {request.submission.max_tokens} tokens"
                  "; allow more time or ask for fewer tokens")) for request in late]

    def hold(self, router_id: str, held: bool) -> None:
        """Do not schedule the sequences of a router that does not listen. They keep blocks that others can spare."""
        if held:
            self._held_routers.add(router_id)
        else:
            self._held_routers.discard(router_id)

    # One step.

    def schedule(self) -> tuple[ScheduledRequest, ...]:
        """Return what to compute next. A plan that was not applied is simply forgotten: call again."""
        plan: list[ScheduledRequest] = []
        budget = self.token_budget
        had_preemptions = self.num_preemptions
        for request in self._ready(decoding=True):
            if request.status is RequestStatus.RUNNING and self._grow(request):
                plan.append(self._scheduled(request, 1))
                budget -= 1
        for request in self._ready(decoding=False):
            if budget > 0:
                plan.append(self._scheduled(request, budget))
                budget -= len(plan[-1].token_ids)
        if self.num_preemptions == had_preemptions:     # else the blocks are needed by those who run
            newcomers, num_blocks = self._admitted(must_admit=not plan), 0
            while budget > 0 and num_blocks < _STARTED_BLOCKS and (newcomer := next(newcomers, None)) is not None:
                plan.append(self._scheduled(newcomer, budget))
                budget -= len(plan[-1].token_ids)
                num_blocks += len(newcomer.block_table)
        self._in_flight = {scheduled.request_id: self._requests[scheduled.request_id] for scheduled in plan}
        return tuple(plan)

    def apply(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Commit a step that succeeded. Requests that ended while it was in flight are dropped."""
        is_of_plan = (plan.epoch_number, plan.step_index) == (result.epoch_number, result.step_index)
        assert is_of_plan, "the result is another step's"
        assert len(plan.requests) == len(result.tokens), "one result for each scheduled request"
        events: list[TokenEvent] = []
        for scheduled, sampled in zip(plan.requests, result.tokens, strict=True):
            assert scheduled.request_id == sampled.request_id, "results come in the plan's order"
            request = self._in_flight.get(scheduled.request_id)
            # The id may have been taken again since: the object tells.
            if request is not None and self._requests.get(request.request_id) is request:
                event = self._commit(request, scheduled, sampled)
                if event is not None:
                    events.append(event)
        self._in_flight = {}
        return events

    # Choosing.

    def _ready(self, decoding: bool) -> list[Request]:
        """Running requests that are not held: those with one token to compute, or those with more."""
        return [request for request in self._running if request.router_id not in self._held_routers
                and (request.num_tokens - request.num_computed_tokens == 1) is decoding]

    def _grow(self, request: Request) -> bool:
        """Give a running request the block of its next token. False: it was the one to give its blocks back."""
        num_tokens = request.num_tokens
        while len(request.block_table) * self.config.block_size < num_tokens:
            block_table = self.blocks.allocate(1)
            if block_table is not None:
                request.block_table += tuple(block_table)
                continue
            victim = self._held_victim() or self._running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _held_victim(self) -> Request | None:
        return next((request for request in reversed(self._running) if request.router_id in self._held_routers), None)

    def _preempt(self, request: Request) -> None:
        request.advance(RequestStatus.PREEMPTED, "KV blocks ran out")
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        request.prompt_logprobs.clear()
        bisect.insort(self._waiting, request, key=_arrival)

    def _admitted(self, must_admit: bool) -> Iterator[Request]:
        """Waiting requests that may start, in order of arrival; the first that does not fit holds back the later ones,
        so that nobody is overtaken for ever. With `must_admit` held requests make room for the first."""
        for request in [request for request in self._waiting if request.router_id not in self._held_routers]:
            while not self._start(request):
                victim = self._held_victim() if must_admit else None
                if victim is None:
                    return
                self._preempt(victim)
            must_admit = False
            yield request

    def _start(self, request: Request) -> bool:
        """Give a waiting request the blocks of its known tokens, cached ones first. False: it does not fit."""
        # A lowered budget does not end who runs, so decodes may exceed it until some have ended.
        if len(self._running) >= min(self.config.max_running_requests, self.token_budget):
            return False
        prefix = self.blocks.cached_prefix(self._reusable_hashes(request))
        hashes = request.block_hashes
        num_shared = len(prefix) * self.config.block_size
        prefix = prefix[:self.states.num_reusable(hashes[:len(prefix)])]
        num_new = self.blocks.num_blocks_for(request.num_tokens) - len(prefix)
        # Those who run may each need a block soon: without that spare the newcomer would be preempted at once.
        block_table = self.blocks.allocate(num_new, prefix, num_spare=len(self._running))
        if block_table is None:
            return False
        if not self.states.start(request.request_id, hashes[len(prefix) - 1] if prefix else None):
            self.blocks.free(block_table)
            return False
        request.advance(RequestStatus.RUNNING, "fits")
        self._waiting.remove(request)
        bisect.insort(self._running, request, key=_arrival)
        request.block_table = tuple(block_table)
        request.snapshot_positions = self._positions_worth_keeping(request, num_shared)
        request.num_computed_tokens = len(prefix) * self.config.block_size
        self.num_cached_tokens += request.num_computed_tokens
        if request.num_preemptions == 0:
            request.num_cached_tokens = min(request.num_computed_tokens, len(request.submission.prompt_token_ids))
        return True

    def _reusable_hashes(self, request: Request) -> Iterator[bytes]:
        """Return the hashes of the blocks that a cached prefix may replace, computed when they are asked for: never all
        tokens, for the last one's logits are needed; none when the prompt's log-probabilities are wanted, which only
        computing gives."""
        if not self.config.prefix_caching or _wants_prompt_logprobs(request):
            return iter(())
        num_blocks = (request.num_tokens - 1) // self.config.block_size
        self._adopt_hashes(request)
        known = request.block_hashes[:num_blocks]
        return itertools.chain(known, (self._hashes(request, index + 1)[index]
                                       for index in range(len(known), num_blocks)))

    def _hashes(self, request: Request, num_blocks: int) -> list[bytes]:
        """Return the known hashes, at least those of the first `num_blocks` blocks, which must be full."""
        known, size = request.block_hashes, self.config.block_size
        if len(known) < num_blocks:
            self._adopt_hashes(request)
            while len(known) < num_blocks:
                start = len(known) * size
                known.append(block_hash(known[-1] if known else b"", _token_ids(request, start, start + size)))
            self._last_hashed = request
        return known

    def _adopt_hashes(self, request: Request) -> None:
        """Take over those of the prompt's full blocks from the request hashed before if it has the very same prompt: it
        is another choice of one client's request, as a rule."""
        last, prompt = self._last_hashed, request.submission.prompt_token_ids
        if last is not None and last.submission.prompt_token_ids is prompt:
            known = request.block_hashes
            known += last.block_hashes[len(known):len(prompt) // self.config.block_size]

    def _scheduled(self, request: Request, budget: int) -> ScheduledRequest:
        submission = request.submission
        start = request.num_computed_tokens
        num_tokens = request.num_tokens
        end = min(num_tokens, start + budget)
        sampling = self._sampling(request) if end == num_tokens else None
        has_history = sampling is not None and sampling.needs_history
        is_scored = _wants_prompt_logprobs(request)
        slots = self.states.plan(request.request_id, self._snapshot_positions(request, start, end),
                                 lambda position: self._name_at(request, position))
        return ScheduledRequest(
            request_id=request.request_id,
            token_ids=_token_ids(request, start, end),
            num_computed_tokens=start,
            block_table=request.block_table,
            sampling=sampling,
            prompt_token_ids=submission.prompt_token_ids if has_history else (),
            output_token_ids=tuple(request.output_token_ids) if has_history else (),
            num_prompt_logprobs=submission.num_prompt_logprobs if is_scored else None,
            prompt_targets=submission.prompt_token_ids[start + 1:end + 1] if is_scored else (),
            state_read=slots.read,
            state_write=slots.write,
            state_snapshots=tuple((position - start, slot) for position, slot in slots.on_the_way))

    def _snapshot_positions(self, request: Request, start: int, end: int) -> list[int]:
        """Return where to keep the state between two positions, both excluded."""
        return [position for position in request.snapshot_positions if start < position < end]

    def _positions_worth_keeping(self, request: Request, num_shared: int) -> tuple[int, ...]:
        """`num_shared`: tokens whose blocks are cached, with or without a snapshot at their end."""
        if not self.states.num_slots or not self.config.prefix_caching:
            return ()
        submission = request.submission
        return snapshot_positions(submission.prompt_token_ids, submission.stop_token_ids, self.config.block_size,
                                  self.config.snapshot_interval_tokens, num_shared)

    def _name_at(self, request: Request, position: int) -> bytes:
        """Name of the state at a block's end: that of the block."""
        index = position // self.config.block_size - 1
        return self._hashes(request, index + 1)[index]

    def _sampling(self, request: Request) -> SamplingSpec:
        submission = request.submission
        spec = submission.sampling
        if len(request.output_token_ids) >= submission.min_tokens or not submission.stop_token_ids:
            return spec
        return dataclasses.replace(spec, banned_token_ids=spec.banned_token_ids + submission.stop_token_ids)

    # Committing.

    def _commit(self, request: Request, scheduled: ScheduledRequest, sampled: SampledToken) -> TokenEvent | None:
        assert request.num_computed_tokens == scheduled.num_computed_tokens, "the step was scheduled from another state"
        assert (sampled.token_id is not None) == (scheduled.sampling is not None), "a token where one was asked for"
        request.num_computed_tokens += len(scheduled.token_ids)
        request.prompt_logprobs += sampled.prompt_logprobs
        self._publish(request, scheduled.num_computed_tokens)
        self._commit_state(request)
        if sampled.token_id is None:
            return None
        is_first = len(request.output_token_ids) == len(request.submission.journal_token_ids)
        request.output_token_ids.append(sampled.token_id)
        reason = self._finish_reason(request)
        event = TokenEvent(
            request.request_id, token_ids=(sampled.token_id,),
            logprobs=(sampled.logprob,) if sampled.logprob is not None else (),
            prompt_logprobs=tuple(request.prompt_logprobs),
            num_cached_tokens=request.num_cached_tokens if is_first else None,
            finish_reason=reason, stop_token_id=self._stop_token_id(request, reason))
        request.prompt_logprobs.clear()
        return event if reason is None else self._end(request, event)

    def _publish(self, request: Request, num_computed_before: int) -> None:
        """Let others share the blocks that this step has filled."""
        if not self.config.prefix_caching:
            return
        size = self.config.block_size
        num_full_before, num_full = num_computed_before // size, request.num_computed_tokens // size
        if num_full > num_full_before:
            hashes = self._hashes(request, num_full)
            for index in range(num_full_before, num_full):
                self.blocks.publish(request.block_table[index], hashes[index])

    def _commit_state(self, request: Request) -> None:
        """A state at the end of a full block is kept where the prompt wants it, and all along the output."""
        position = request.num_computed_tokens
        is_output = position > len(request.submission.prompt_token_ids)
        keeps = self.config.prefix_caching and position % self.config.block_size == 0 and (
            is_output or position in request.snapshot_positions)
        self.states.commit(request.request_id, lambda at: self._name_at(request, at), position, keeps, is_output)

    def _finish_reason(self, request: Request) -> FinishReason | None:
        """Judge the last output token. add() has made sure that max_tokens ends it within max_model_len."""
        submission, num_output = request.submission, len(request.output_token_ids)
        if request.output_token_ids[-1] in submission.stop_token_ids and num_output > submission.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_output >= submission.max_tokens else None

    def _stop_token_id(self, request: Request, reason: FinishReason | None) -> int | None:
        return request.output_token_ids[-1] if reason is FinishReason.STOP else None

    def _end(self, request: Request, event: TokenEvent) -> TokenEvent:
        """End a request, the one way out: status, queues, blocks, and the event that says so."""
        assert event.finish_reason is not None
        try:
            request.advance(_END[event.finish_reason], event.error or event.finish_reason)
        finally:
            del self._requests[request.request_id]
            for queue in (self._waiting, self._running):
                if request in queue:
                    queue.remove(request)
            self._release(request)
        return event

    def _release(self, request: Request) -> None:
        self.blocks.free(request.block_table)
        request.block_table = ()
        self.states.release(request.request_id)


def _token_ids(request: Request, start: int, end: int) -> tuple[int, ...]:
    """Return known tokens at positions start to end - 1, without building the whole sequence."""
    prompt = request.submission.prompt_token_ids
    output = request.output_token_ids[max(0, start - len(prompt)):max(0, end - len(prompt))]
    return (*prompt[start:end], *output)


def _wants_prompt_logprobs(request: Request) -> bool:
    """Return whether they are still due: they travel with the first token, also with one of the journal."""
    return request.submission.num_prompt_logprobs is not None and not request.output_token_ids
