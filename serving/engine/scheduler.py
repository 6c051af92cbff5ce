"""Decides which sequences compute how many tokens in the next step of one shard. Pure: time is an argument.

There is no prefill or decode phase: every sequence has known tokens (prompt, journal, output), num_computed_tokens of
them are in the KV cache, and it catches up under the step's token budget. schedule() only hands out KV blocks, which a
failed step need not undo; tokens, computed counts and shared prefixes are committed by apply(), after the step has
succeeded. So a step that failed is simply scheduled again.
"""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import replace
from operator import attrgetter

from model.step import SampledToken, ScheduledRequest, StepPlan, StepResult
from serving.config import SchedulerConfig
from serving.engine.cache_room import CacheRoom
from serving.engine.prefill_budget import PrefillBudget
from serving.engine.request import STATUS_AT_END, FinishReason, Request, RequestStatus, TokenEvent
from serving.engine.sequence_caches import SequenceCaches
from serving.engine.tenant_shares import Room, TenantShares, last_to_keep, who_gives_way
from serving.errors import InvalidRequestError, ServingError
from serving.fair_queue import FairQueue
from serving.token_counters import CACHED_WEIGHT, OUTPUT_WEIGHT, PROMPT_WEIGHT

_STARTED_BLOCKS = 1 << 15       # of a step's newcomers: to find and hold them takes some 5 ms, and all else waits


class Scheduler:
    """Continuous batching: decodes first, then chunks of prefill of those that run and of newcomers, in the order of
    serving/fair_queue.py: by priority, then by what tenants were served, then by arrival.

    A sequence gets the blocks of all its known tokens when it starts to run, and one more whenever it outgrows them.
    When none is free, the last in turn gives its blocks back and is recomputed later, of a tenant that has more than
    its part; sequences whose router does not listen (held) give theirs first.
    """

    def __init__(self, config: SchedulerConfig, num_blocks: int, max_model_len: int, num_state_slots: int = 0,
                 block_bytes: int = 0, slot_bytes: int = 0) -> None:
        """`num_state_slots`: of models with layers that keep a state. `block_bytes` and `slot_bytes`, of one each, are
        told to whom they refuse."""
        self.config = config
        self.room = CacheRoom(max_model_len, num_blocks, config.block_size, block_bytes, slot_bytes)
        self.token_budget = config.max_batch_tokens     # of a step, at least 1; may change between two steps
        self.prefill_budget: PrefillBudget | None = None    # where those that decode have an SLO
        self.num_preemptions = 0
        self.num_cached_tokens = 0                      # not computed, as the prefix cache had them
        self._caches = SequenceCaches(config, num_blocks, num_state_slots)
        self.blocks, self.states = self._caches.blocks, self._caches.states
        self._requests: dict[str, Request] = {}
        self._waiting: FairQueue[Request] = FairQueue()
        self._running: list[Request] = []       # in the order of their turns
        self._num_of: Counter[tuple[int, int, int]] = Counter()     # requests, by their kind
        self._now_s = 0.0                       # as last told
        self._in_flight: dict[str, Request] = {}
        self._held_routers: set[str] = set()
        self._num_arrived = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def has_work(self) -> bool:
        """Return whether schedule() would return something."""
        return any(self._may_run(request) for request in self._requests.values())

    @property
    def num_tokens_to_compute(self) -> int:
        """Return the known tokens of all requests that are ready and have more than one to compute."""
        left = (request.num_tokens - request.num_computed_tokens for request in self._requests.values()
                if self._may_run(request))
        return sum(num_tokens for num_tokens in left if num_tokens > 1)

    def reusable_names(self, request: Request) -> tuple[bytes, ...]:
        """Return the names of all blocks of a request that a cached prefix may replace, were they all here."""
        return tuple(self._caches.reusable_names(request))

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
        self._num_of[request.kind] += 1
        self._waiting.add(request, request.arrival_s)
        reason = request.finish_reason() if submission.journal_token_ids else None
        if reason is None:
            return None
        request.advance(RequestStatus.RUNNING, "journal is complete")
        return self._end(request, TokenEvent(request.request_id, finish_reason=reason,
                                             stop_token_id=request.stop_token_id(reason)))

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

    def set_ready(self, request: Request) -> None:
        """Schedule a request from now on that was added before it was ready."""
        request.is_ready = True

    def fail(self, request: Request, error: str) -> TokenEvent | None:
        """End a request that cannot go on. None when it is not open any more."""
        if self._requests.get(request.request_id) is not request:
            return None
        return self._end(request, TokenEvent(request.request_id, finish_reason=FinishReason.FAILED, error=error))

    def hold(self, router_id: str, held: bool) -> None:
        """Do not schedule the sequences of a router that does not listen. They keep blocks that others can spare."""
        if held:
            self._held_routers.add(router_id)
        else:
            self._held_routers.discard(router_id)

    def resize(self, num_blocks: int) -> tuple[dict[int, int], list[TokenEvent]]:
        """Go on with another number of KV blocks, between two steps and transfers.

        Returns the new number of every block whose content is kept, and the ends of the sequences that can never fit
        any more: they are given up, for another shard may hold them. Of those that run the last arrived give their
        blocks back where there are too few.
        """
        self._in_flight = {}
        while self.blocks.num_held > num_blocks:
            self._preempt(self._victim())
        new_number_of = self.blocks.resize(num_blocks)
        for request in self._running:
            request.block_table = tuple(new_number_of[block] for block in request.block_table)
        self.room = replace(self.room, num_blocks=num_blocks)
        ended = []
        for request in list(self._requests.values()):
            try:
                self.room.check(request.submission)
            except ServingError:
                ended.append(self._end(request, TokenEvent(request.request_id, finish_reason=FinishReason.CANCELLED)))
        return new_number_of, ended

    # One step.

    def schedule(self, now_s: float) -> tuple[ScheduledRequest, ...]:
        """Return what to compute next. A plan that was not applied is simply forgotten: call again."""
        self._now_s = now_s
        had_preemptions = self.num_preemptions
        decoding, prefilling = self._ready()
        for request in decoding:
            if request.status is RequestStatus.RUNNING:
                self._grow(request)
        may_start = self.num_preemptions == had_preemptions     # else the blocks are needed by those who run
        may_start = self._make_room() or may_start
        plan = [self._scheduled(request, 1) for request in decoding if request.status is RequestStatus.RUNNING]
        prefilling = [request for request in prefilling if request.status is RequestStatus.RUNNING]     # still
        self._add_prompts(plan, self._num_prompt_tokens(len(plan)), prefilling, may_start)
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

    def _may_run(self, request: Request) -> bool:
        return request.is_ready and request.router_id not in self._held_routers

    def _ready(self) -> tuple[list[Request], list[Request]]:
        """Running requests that are not held: those with one token to compute, and those with more."""
        found: tuple[list[Request], list[Request]] = ([], [])
        for request in self._running:
            if request.router_id not in self._held_routers:
                found[request.num_tokens - request.num_computed_tokens > 1].append(request)
        return found

    def _grow(self, request: Request) -> None:
        """Give a running request the block of its next token, unless it is the one to give its blocks back."""
        while not self._caches.has_block_of_next_token(request):
            victim = self._victim()
            self._preempt(victim)
            if victim is request:
                return

    def _held_victim(self) -> Request | None:
        return next((request for request in reversed(self._running) if request.router_id in self._held_routers), None)

    def _preempt(self, request: Request) -> None:
        request.advance(RequestStatus.PREEMPTED, "KV blocks ran out")
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._running.remove(request)
        self._caches.release(request)
        request.num_computed_tokens = 0
        request.prompt_logprobs.clear()
        self._waiting.add(request, self._now_s)

    def _victim(self) -> Request:
        """Return who must give its blocks back."""
        return self._held_victim() or (last_to_keep(self._running, self._shares()) if len(self._num_of) > 1
                                       else self._running[-1])

    def _shares(self) -> TenantShares:
        return TenantShares(self._running, {tenant: weight for tenant, _, weight in self._num_of},
                            Room(self.room.num_blocks, self._max_running))

    @property
    def _max_running(self) -> int:
        """A lowered budget does not end who runs, so decodes may exceed it until some have ended."""
        return min(self.config.max_running_requests, self.token_budget)

    def _num_prompt_tokens(self, num_decoding: int) -> int:
        if self.prefill_budget is None:
            return self.token_budget - num_decoding
        return self.prefill_budget.of_step(self.token_budget, num_decoding)

    def _add_prompts(self, plan: list[ScheduledRequest], budget: int, prefilling: list[Request],
                     may_start: bool) -> None:
        """Add chunks of prompts to a step, of those that run and of newcomers, whose turn it is first.

        A newcomer that does not fit holds back those after it, so that nobody is overtaken for ever."""
        begun = sorted(prefilling, key=self._rank, reverse=True)
        num_blocks = 0      # of newcomers
        while budget > 0:
            newcomer = self._next_waiting() if may_start and num_blocks < _STARTED_BLOCKS else None
            if newcomer is None and not begun:
                return
            if newcomer is None or (begun and self._rank(begun[-1]) < self._rank(newcomer)):
                request = begun.pop()
            elif self._admit(newcomer, must_admit=not plan and not begun):
                request = newcomer
                num_blocks += len(request.block_table)
            else:
                may_start = False
                continue
            self._waiting.served(request.priority, self._now_s)
            plan.append(self._scheduled(request, budget))
            budget -= len(plan[-1].token_ids)
            self._charge(request, request.num_computed_tokens + len(plan[-1].token_ids), PROMPT_WEIGHT)

    def _charge(self, request: Request, end: int, weight: float) -> None:
        """Charge a tenant for known tokens up to a position, each once, however often it is computed. Drawn ones cost
        when they are drawn."""
        end = min(end, len(request.submission.prompt_token_ids) + len(request.submission.journal_token_ids))
        if end > request.num_charged_tokens:
            self._waiting.charge(request, weight * (end - request.num_charged_tokens))
            request.num_charged_tokens = end

    def _rank(self, request: Request) -> tuple[float, int, float, int]:
        return self._waiting.rank(request, self._now_s)

    def _next_waiting(self) -> Request | None:
        return next((request for queue in self._waiting.queues(self._now_s) for request in queue
                     if self._may_run(request)), None)

    def _admit(self, request: Request, must_admit: bool) -> bool:
        """Start a waiting request if it fits. With `must_admit` held requests make room for it."""
        while not self._start(request):
            victim = self._held_victim() if must_admit else None
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _make_room(self) -> bool:
        """Let those give way to the next newcomer that are less urgent, or go beyond their tenant's part. Return
        whether anybody did."""
        if len(self._num_of) < 2 or not self._running or (newcomer := self._next_waiting()) is None:
            return False
        lacking = self._lacking(newcomer)
        if lacking.num_blocks <= 0 and lacking.num_places <= 0:
            return False
        num_blocks = self.blocks.num_blocks_for(newcomer.num_tokens)
        giving = who_gives_way(newcomer, num_blocks, self._running, self._shares(), lacking)
        for request in giving:
            self._preempt(request)
        return bool(giving)

    def _lacking(self, request: Request) -> Room:
        """Return what must be given back before a waiting request can start; 0 or less: nothing."""
        num_places = len(self._running) + 1 - self._max_running
        if not self._caches.has_state_room:
            num_places = max(num_places, 1)
        return Room(self._caches.num_lacking_blocks(request, num_spare=len(self._running)), num_places)

    def _start(self, request: Request) -> bool:
        """Give a waiting request the blocks of its known tokens, cached ones first. False: it does not fit."""
        if len(self._running) >= self._max_running:
            return False
        # Those who run may each need a block soon: without that spare the newcomer would be preempted at once.
        if not self._caches.start(request, num_spare=len(self._running)):
            return False
        request.advance(RequestStatus.RUNNING, "fits")
        self._waiting.remove(request)
        bisect.insort(self._running, request, key=attrgetter("turn"))
        self.num_cached_tokens += request.num_computed_tokens
        if request.num_preemptions == 0:
            request.num_cached_tokens = min(request.num_computed_tokens, len(request.submission.prompt_token_ids))
            self._charge(request, request.num_computed_tokens, CACHED_WEIGHT)
        return True

    def _scheduled(self, request: Request, budget: int) -> ScheduledRequest:
        """Return at most `budget` tokens of a request. What few requests need is filled in where it is asked for."""
        submission, start, num_tokens = request.submission, request.num_computed_tokens, request.num_tokens
        end = min(num_tokens, start + budget)
        sampling = request.next_sampling() if end == num_tokens else None
        scheduled = ScheduledRequest(submission.request_id, request.token_ids(start, end), start,
                                     request.block_table, sampling)
        if sampling is not None and sampling.needs_history:
            scheduled = scheduled._replace(prompt_token_ids=submission.prompt_token_ids,
                                           output_token_ids=tuple(request.output_token_ids))
        if request.wants_prompt_logprobs:
            scheduled = scheduled._replace(num_prompt_logprobs=submission.num_prompt_logprobs,
                                           prompt_targets=submission.prompt_token_ids[start + 1:end + 1])
        if self.states.num_slots:
            slots = self._caches.slots_of_step(request, start, end)
            scheduled = scheduled._replace(
                state_read=slots.read, state_write=slots.write,
                state_snapshots=tuple((position - start, slot) for position, slot in slots.on_the_way))
        return scheduled

    # Committing.

    def _commit(self, request: Request, scheduled: ScheduledRequest, sampled: SampledToken) -> TokenEvent | None:
        assert request.num_computed_tokens == scheduled.num_computed_tokens, "the step was scheduled from another state"
        is_drawn = sampled.token_id is not None or bool(sampled.error)
        assert is_drawn == (scheduled.sampling is not None), "a token where one was asked for"
        request.num_computed_tokens += len(scheduled.token_ids)
        if sampled.prompt_logprobs:
            request.prompt_logprobs += sampled.prompt_logprobs
        self._caches.commit(request, scheduled.num_computed_tokens)
        if sampled.error:
            return self.fail(request, sampled.error)
        if sampled.token_id is None:
            return None
        is_first = len(request.output_token_ids) == len(request.submission.journal_token_ids)
        request.output_token_ids.append(sampled.token_id)
        self._waiting.charge(request, OUTPUT_WEIGHT)
        reason = request.finish_reason()
        event = TokenEvent(
            request.request_id, (sampled.token_id,), () if sampled.logprob is None else (sampled.logprob,),
            num_cached_tokens=request.num_cached_tokens if is_first else None, finish_reason=reason,
            num_received_tokens=request.num_received_tokens if is_first else 0)
        if request.prompt_logprobs:
            event = event._replace(prompt_logprobs=tuple(request.prompt_logprobs))
            request.prompt_logprobs.clear()
        if reason is None:
            return event
        return self._end(request, event._replace(stop_token_id=request.stop_token_id(reason)))

    def _end(self, request: Request, event: TokenEvent) -> TokenEvent:
        """End a request, the one way out: status, queues, blocks, and the event that says so."""
        assert event.finish_reason is not None
        try:
            request.advance(STATUS_AT_END[event.finish_reason], event.error or event.finish_reason)
        finally:
            del self._requests[request.request_id]
            self._num_of -= Counter((request.kind,))        # keeps no zeros
            if request in self._running:
                self._running.remove(request)
            else:
                self._waiting.remove(request)
            self._caches.release(request)
        return event
