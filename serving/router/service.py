"""The router's service, which both doors call: admission -> shard choice -> journal -> shard link -> text.

Every sequence lives in the journal from its submission to its end, whichever shard computes it. One whose shard is gone
is sent to another with what it has produced, and waits, until its request's deadline, while none takes requests. Every
accepted choice ends exactly once, in `_end`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Collection, Sequence

from serving.config import RouterConfig, SchedulerConfig
from serving.engine.request import FinishReason, TokenEvent
from serving.errors import ContextLengthError, DeadlineExceededError, NotReadyError, ServingError
from serving.link.epoch import Epoch
from serving.link.messages import error_of_text
from serving.link.security import PLAIN, LinkSecurity
from serving.metrics import MoveCause, RouterMetrics
from serving.router.admission import Admission, Ticket
from serving.router.choice import Choice
from serving.router.generation import GenerationDelta, GenerationRequest, ModelCard
from serving.router.handover import Handovers, Moving
from serving.router.journal import Journal
from serving.router.open_request import OpenPart, OpenRequest, new_choices, new_submissions, priority_of
from serving.router.request_checks import check_requests
from serving.router.router_load import LoadCounter, RouterLoad
from serving.router.shard_choice import block_hashes
from serving.router.shard_links import ShardLinks
from serving.text.tokenizer import Tokenizer
from serving.token_counters import token_cost

logger = logging.getLogger(__name__)

# A request that sets no max_tokens may use the whole context, but few do: it is admitted as if it wanted so many.
ADMITTED_OUTPUT_TOKENS = 1024
MAX_GIVEN_UP = 3    # times that shards may give a sequence up, for one that thinks it has room has none


class InferenceService:
    """Serves one model in one router replica. Runs on one event loop."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, config: RouterConfig, scheduler: SchedulerConfig,
                 metrics: RouterMetrics, clock: Callable[[], float], security: LinkSecurity = PLAIN) -> None:
        self._card = card
        self._tokenizer = tokenizer
        self._config = config
        self._block_size = scheduler.block_size
        self._metrics = metrics
        self._clock = clock
        # Part of every sequence's id, so that ids of different routers, and of one before and after a restart, differ.
        self.router_id = secrets.token_hex(4)
        self._num_requests = 0
        self._admission = Admission(config.admission, clock)
        # Asked when it is read: requests that wait have nobody who could set it.
        metrics.requests.num_queued.set_function(lambda: self._admission.num_queued)
        self._counter = LoadCounter()
        self._journal = Journal()
        self._links = ShardLinks(self.router_id, config.stream_window, scheduler, clock, self, metrics.shards,
                                 security)
        self._handovers = Handovers(self._links, self, scheduler.prefix_caching)
        self._open: dict[str, tuple[OpenPart, Choice]] = {}         # by sequence id
        self._unplaced: dict[str, None] = {}                        # sequences that wait for a shard, in order
        metrics.requests.num_unplaced.set_function(lambda: len(self._unplaced))
        self.is_asleep: Callable[[], bool] = lambda: False          # shards start when requests wait for them here
        self.on_shards_changed: Callable[[], None] = lambda: None   # is_ready() may have changed
        self._num_generating = 0                                    # clients' requests
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def cards(self) -> tuple[ModelCard, ...]:
        return (self._card,)

    def is_ready(self) -> bool:
        """Return whether what comes is served, or held until the shards have been woken."""
        return self._links.is_ready or self.is_asleep()

    def has_room(self) -> bool:
        """Return whether it serves and nobody waits for admission, so that work may begin which has time."""
        return self.is_ready() and self._admission.num_queued == 0

    @property
    def epoch_number(self) -> int:
        """Return the number of the running epoch; 0 before the first."""
        return self._links.epoch.number if self._links.epoch else 0

    def load(self) -> RouterLoad:
        """Return what waits and runs here, for the autoscaler."""
        return self._counter.load(self._open.values())

    def set_epoch(self, epoch: Epoch, leaving: Collection[str] = ()) -> None:
        """Go over to a newer epoch, or to newer shares of the same one. An older one is ignored.

        What is open goes on where its member stays, and is continued elsewhere where not. Members that are `leaving`,
        by their shard ids, get nothing new.
        """
        self._links.set_epoch(epoch, leaving)
        self._metrics.epoch_number.set(self.epoch_number)

    async def drain(self) -> None:
        """Return when no client's request is open. New ones are taken meanwhile."""
        await self._is_idle.wait()

    async def close(self) -> None:
        """End everything that is open."""
        self._admission.close()
        for part, _ in list(self._open.values()):
            self._fail(part.whole, NotReadyError("this router is shutting down", fix="send the request again"))
        await self._links.close()

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, GenerationDelta]]:
        """Stream the choices of all parts of one client's request, each delta with its part's index.

        Parts start as there is room. Closing the iterator cancels them all. Raises ServingError, at once or later, and
        then no part goes on.
        """
        self._begin_generating()
        open_request: OpenRequest | None = None
        try:
            open_request = await self._accept(requests)
            self._start(open_request.parts[0])
            if len(requests) > 1:
                open_request.starter = asyncio.create_task(self._start_parts(open_request, requests[1:]))
                open_request.starter.add_done_callback(lambda task: self._starter_ended(open_request, task))
            num_unfinished = sum(request.params.n for request in requests)
            while num_unfinished:
                for item in await open_request.outbox.take():
                    num_unfinished -= item[1].finish_reason is not None
                    yield item
        finally:
            if open_request is not None:
                self._abandon(open_request, FinishReason.CANCELLED)
            self._end_generating()

    def _begin_generating(self) -> None:
        self._num_generating += 1
        self._is_idle.clear()

    def _end_generating(self) -> None:
        self._num_generating -= 1
        if self._num_generating == 0:
            self._is_idle.set()

    # From the door to the shards.

    async def _accept(self, requests: Sequence[GenerationRequest]) -> OpenRequest:
        """Check all parts and admit the first. Raises ServingError."""
        arrival_s, first = self._clock(), requests[0]
        deadline_s = arrival_s + (self._config.admission.default_deadline_s if first.deadline_s is None
                                  else first.deadline_s)
        open_request = OpenRequest(arrival_s, deadline_s)
        try:
            check_requests(requests, self._card, self._tokenizer.num_embeddings, self._links.length_limit)
            if self._links.epoch is None and not self.is_asleep():
                raise NotReadyError("the shards are still starting", fix="try again; `moesaic status` shows them")
            await self._admit(open_request, first)
        except ServingError as error:
            self._metrics.requests.request_refused(error)
            raise
        open_request.deadline_timer = asyncio.get_running_loop().call_later(
            max(0.0, deadline_s - self._clock()), self._expire, open_request)
        return open_request

    async def _admit(self, open_request: OpenRequest, request: GenerationRequest) -> None:
        n, num_prompt, num_output = request.params.n, len(request.prompt_token_ids), self._num_expected(request)
        ticket = Ticket(request.tenant.name, n, n * (num_prompt + num_output),
                        token_cost(n * num_prompt, 0, n * num_output), is_later_part=bool(open_request.parts),
                        priority=priority_of(request), weight=request.tenant.weight)
        part = OpenPart(open_request, len(open_request.parts), request, ticket)
        open_request.parts.append(part)
        self._counter.arrived(part, self._num_expected(request))
        try:
            await self._admission.enter(ticket, open_request.deadline_s)
        finally:
            self._counter.entered(part)

    def _num_expected(self, request: GenerationRequest) -> int:
        room = self._card.max_model_len - len(request.prompt_token_ids)
        return min(room, ADMITTED_OUTPUT_TOKENS) if request.params.max_tokens is None else request.params.max_tokens

    async def _start_parts(self, open_request: OpenRequest, requests: Sequence[GenerationRequest]) -> None:
        """Admit and start the parts after the first, one after the other."""
        for request in requests:
            await asyncio.sleep(0)      # others' turn: a part takes a moment, and hundreds may find room
            await self._admit(open_request, request)
            self._start(open_request.parts[-1])

    def _starter_ended(self, open_request: OpenRequest, task: asyncio.Task[None]) -> None:
        """End the request when anything has ended its starter before its time."""
        if open_request.is_over:
            return
        error = NotReadyError("the request was stopped", fix="send it again") if task.cancelled() else task.exception()
        if error is not None:
            self._fail(open_request, _shown(error))

    def _start(self, part: OpenPart) -> None:
        """Make the choices and send them to shards. Each is accepted here, and from here on ends exactly once."""
        params, now_s = part.request.params, self._clock()
        part.request.trace.queued(part.whole.arrival_s, now_s)
        part.hashes = block_hashes(part.request.prompt_token_ids, self._block_size)
        self._num_requests += 1
        prefix = f"{self.router_id}-{self._num_requests}-{part.request.request_id}"
        part.choices = new_choices(part, [f"{prefix}-{index}" for index in range(params.n)], self._tokenizer)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        submissions = new_submissions(part, seed, self._card.max_model_len, self._tokenizer.eos_token_ids)
        for choice, submission in zip(part.choices, submissions, strict=True):
            self._journal.open(submission)
            self._open[choice.sequence_id] = (part, choice)
            self._metrics.requests.admitted(part.num_prompt_tokens, now_s - part.whole.arrival_s)
        for choice in part.choices:
            self._place(choice.sequence_id)

    def _place(self, sequence_id: str) -> None:
        """Send a sequence, with what it has produced, to the best shard; it waits while there is none."""
        part, choice = self._open.get(sequence_id, (None, None))
        if part is None or choice is None:
            return
        try:
            if not self._links.place(self._journal.resubmission(sequence_id), part.hashes,
                                     may_shorten=part.request.params.max_tokens is None):
                self._unplaced[sequence_id] = None
            elif choice.index in part.moved:
                self._metrics.requests.sequence_moved("resubmitted")
        except Exception as error:      # a fault of ours in one request must not keep the others from their shards
            self._fail(part.whole, _shown(error))

    # From the shards to the door: LinksOwner.

    def sequence_events(self, events: list[TokenEvent]) -> None:
        for event in events:
            if (found := self._open.get(event.request_id)) is None:
                self._handovers.event(event)
                continue
            part, choice = found
            try:
                self._advance(part, choice, event)
            except Exception as error:      # a fault in one request's text must not end the link of all
                self._fail(part.whole, _shown(error))

    def sequences_lost(self, sequence_ids: list[str], cause: MoveCause, why: str) -> None:
        """Continue them elsewhere, at once where a shard takes requests."""
        for sequence_id in sequence_ids:
            if sequence_id in self._open:
                part, choice = self._open[sequence_id]
                _note_move(part, choice, cause)
                self._place(sequence_id)
            else:
                self._handovers.lost(sequence_id)
        num_waiting = sum(sequence_id in self._unplaced for sequence_id in sequence_ids)
        logger.warning("sequences_lost num=%d num_waiting=%d cause=%s why=%s", len(sequence_ids), num_waiting, cause,
                       why)

    def shards_changed(self) -> None:
        waiting, self._unplaced = self._unplaced, {}
        for sequence_id in waiting:
            self._place(sequence_id)
        if waiting:
            logger.info("sequences_placed num=%d num_waiting=%d", len(waiting) - len(self._unplaced),
                        len(self._unplaced))
        self._handovers.advance()
        self.on_shards_changed()

    # From a member that leaves to another: Mover.

    def moving(self, sequence_id: str) -> Moving:
        part, _ = self._open[sequence_id]
        return Moving(self._journal.resubmission(sequence_id), part.hashes, part.request.params.max_tokens is None)

    def move(self, sequence_id: str, shard_id: str, way: str) -> None:
        """Under another id, so that what is still on its way from the first is not heard any more."""
        if sequence_id not in self._open or not self._links.is_on_leaving(sequence_id):
            return
        moving = self.moving(sequence_id)
        target = self._links.choose(moving.submission, moving.hashes, moving.may_shorten, only=shard_id)
        if target is None:
            return
        part, choice = self._open.pop(sequence_id)
        self._links.remove(sequence_id, (), is_over_in_shard=False)
        choice.num_moves += 1
        choice.sequence_id = f"{sequence_id.partition('~')[0]}~{choice.num_moves}"
        self._open[choice.sequence_id] = (part, choice)
        self._journal.rename(sequence_id, choice.sequence_id)
        _note_move(part, choice, MoveCause.LEAVING)
        self._metrics.requests.sequence_moved(way)
        logger.info("sequence_moved sequence_id=%s shard_id=%s way=%s", choice.sequence_id, shard_id, way)
        self._links.send(self._journal.resubmission(choice.sequence_id), part.hashes, target)

    def _advance(self, part: OpenPart, choice: Choice, event: TokenEvent) -> None:
        """Take up what one step did for one choice."""
        if event.finish_reason is FinishReason.FAILED or event.finish_reason is FinishReason.CANCELLED:
            self._take_back(part, choice, event)
            return
        self._journal.append(choice.sequence_id, event.token_ids)
        delta = choice.add(event)
        self._count(part, delta)
        part.whole.outbox.put(part.index, delta)
        if delta.finish_reason is not None:     # perhaps by a stop string, of which the shard knows nothing
            self._end(part, choice, delta.finish_reason, is_over_in_shard=event.finish_reason is not None)

    def _take_back(self, part: OpenPart, choice: Choice, event: TokenEvent) -> None:
        """Fail what has failed in its shard; but one that cancels a sequence, or cannot hold it, gives it up to others.

        The load that came with the event says how much room there is now.
        """
        error = error_of_text(event.error or "the shard gave the request up")
        is_given_up = event.finish_reason is FinishReason.CANCELLED or isinstance(error, ContextLengthError)
        choice.num_given_up += 1
        if not is_given_up or choice.num_given_up > MAX_GIVEN_UP:
            self._fail(part.whole, error)
            return
        logger.info("sequence_given_up sequence_id=%s why=%s", choice.sequence_id, error)
        self._links.take_back(choice.sequence_id)
        _note_move(part, choice, MoveCause.GIVEN_UP)
        self._place(choice.sequence_id)

    def _count(self, part: OpenPart, delta: GenerationDelta) -> None:
        if not delta.token_ids:
            return
        now_s, metrics, arrival_s = self._clock(), self._metrics.requests, part.whole.arrival_s
        before_s = part.last_token_s.get(delta.choice)
        part.last_token_s[delta.choice] = now_s
        if part.moved and (cause := part.moved.pop(delta.choice, None)) and before_s is not None:
            metrics.stream_paused(cause, now_s - before_s)
        is_first = before_s is None
        num_prompt, num_cached = (part.num_prompt_tokens, delta.num_cached_tokens or 0) if is_first else (0, 0)
        part.cost += token_cost(num_prompt, num_cached, len(delta.token_ids))
        if is_first:
            metrics.first_token_arrived(now_s - arrival_s, part.num_prompt_tokens, delta.num_cached_tokens or 0)
        num_later = len(delta.token_ids) - is_first
        if num_later:
            metrics.tokens_arrived(num_later, now_s - (arrival_s if before_s is None else before_s))

    # Ends.

    def _expire(self, open_request: OpenRequest) -> None:
        num_tokens = sum(choice.num_tokens for part in open_request.parts for choice in part.choices)
        self._fail(open_request, DeadlineExceededError(
            f"the request's deadline passed after {num_tokens} tokens", fix="allow more time or ask for fewer tokens"))

    def _fail(self, open_request: OpenRequest, error: ServingError) -> None:
        if open_request.is_over:
            return
        open_request.outbox.fail(error)
        self._abandon(open_request, FinishReason.FAILED)

    def _abandon(self, open_request: OpenRequest, reason: FinishReason) -> None:
        """End the choices that have not ended, here and in the shards; parts that wait leave the queue."""
        open_request.is_over = True
        for later in (open_request.deadline_timer, open_request.starter):
            if later is not None:
                later.cancel()
        for part in open_request.parts:
            for choice in part.choices:
                if not choice.is_ended:
                    self._end(part, choice, reason)
            self._admission.release(part.ticket, part.cost)

    def _end(self, part: OpenPart, choice: Choice, reason: FinishReason, is_over_in_shard: bool = False) -> None:
        """End a choice: the one way out."""
        assert not choice.is_ended, "a choice ends once"
        choice.is_ended = True
        self._links.remove(choice.sequence_id, self._journal.close(choice.sequence_id), is_over_in_shard)
        del self._open[choice.sequence_id]
        self._unplaced.pop(choice.sequence_id, None)
        self._handovers.ended(choice.sequence_id)
        self._counter.ended(choice.num_tokens)
        self._metrics.requests.request_ended(reason, self._clock() - part.whole.arrival_s, choice.num_tokens)
        if all(other.is_ended for other in part.choices):
            self._admission.release(part.ticket, part.cost)


def _note_move(part: OpenPart, choice: Choice, cause: MoveCause) -> None:
    part.moved.setdefault(choice.index, cause)
    part.request.trace.moved(cause.value)


def _shown(error: BaseException) -> ServingError:
    """Return the error for the client; a fault of ours is logged."""
    if isinstance(error, ServingError):
        return error
    logger.error("request_failed error=%r", error, exc_info=error)
    return ServingError(f"the router failed the request: {error!r:.200}")
