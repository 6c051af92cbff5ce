"""The router's service, which both doors call: admission -> shard choice -> journal -> shard link -> text.

Every sequence lives in the journal from its submission to its end, whichever shard computes it. Every accepted choice
ends exactly once, in `_end`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence

from serving.config import RouterConfig, SchedulerConfig
from serving.engine.request import FinishReason, TokenEvent
from serving.errors import DeadlineExceededError, NotReadyError, ServingError, ShardFailedError
from serving.link.epoch import Epoch
from serving.link.messages import error_of_text
from serving.metrics import RouterMetrics
from serving.router.admission import Admission, Ticket
from serving.router.choice import Choice
from serving.router.generation import GenerationDelta, GenerationRequest, ModelCard
from serving.router.journal import Journal
from serving.router.open_request import OpenPart, OpenRequest, new_choices, new_submissions
from serving.router.request_checks import check_requests
from serving.router.shard_choice import block_hashes
from serving.router.shard_links import CONNECT_WAIT_S, ShardLinks
from serving.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# A request that sets no max_tokens may use the whole context, but few do: it is admitted as if it wanted so many.
ADMITTED_OUTPUT_TOKENS = 1024


class InferenceService:
    """Serves one model in one router replica. Runs on one event loop."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, config: RouterConfig, scheduler: SchedulerConfig,
                 metrics: RouterMetrics, clock: Callable[[], float]) -> None:
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
        self._journal = Journal()
        self._links = ShardLinks(self.router_id, config.stream_window, scheduler, clock, self, metrics.shards)
        self._open: dict[str, tuple[OpenPart, Choice]] = {}         # by sequence id
        self._unplaced: list[str] = []                              # sequences that wait for a new epoch's links
        self._num_generating = 0                                    # clients' requests
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def cards(self) -> tuple[ModelCard, ...]:
        return (self._card,)

    def is_ready(self) -> bool:
        return self._links.is_ready

    @property
    def epoch_number(self) -> int:
        """Return the number of the running epoch; 0 before the first."""
        return self._links.epoch.number if self._links.epoch else 0

    async def set_epoch(self, epoch: Epoch, connect_wait_s: float = CONNECT_WAIT_S) -> None:
        """Go over to a newer epoch; what is open is continued there. An older one is ignored."""
        self._metrics.epoch_number.set(max(epoch.number, self.epoch_number))
        await self._links.set_epoch(epoch, connect_wait_s)

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
            if self._links.epoch is None:
                raise NotReadyError("the shards are still starting", fix="try again; `moesaic status` shows them")
            await self._admit(open_request, first)
        except ServingError as error:
            self._metrics.requests.request_refused(error)
            raise
        open_request.deadline_timer = asyncio.get_running_loop().call_later(
            max(0.0, deadline_s - self._clock()), self._expire, open_request)
        return open_request

    async def _admit(self, open_request: OpenRequest, request: GenerationRequest) -> None:
        num_tokens = request.params.n * (len(request.prompt_token_ids) + self._num_expected(request))
        ticket = Ticket(request.tenant, request.params.n, num_tokens, is_later_part=bool(open_request.parts))
        part = OpenPart(open_request, len(open_request.parts), request, ticket)
        open_request.parts.append(part)
        await self._admission.enter(ticket, open_request.deadline_s)

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
        """Send a sequence, with what it has produced, to the best shard; if none can be had, its request fails."""
        part, choice = self._open.get(sequence_id, (None, None))
        if part is None or choice is None:
            return
        if self._links.is_settling:
            self._unplaced.append(sequence_id)
            return
        try:
            self._links.place(self._journal.resubmission(sequence_id), part.hashes,
                              may_shorten=part.request.params.max_tokens is None)
        except Exception as error:      # a fault of ours in one request must not keep the others from their shards
            self._fail(part.whole, _shown(error))

    # From the shards to the door: LinksOwner.

    def sequence_events(self, events: list[TokenEvent]) -> None:
        for event in events:
            if event.request_id not in self._open:
                continue
            part, choice = self._open[event.request_id]
            try:
                self._advance(part, choice, event)
            except Exception as error:      # a fault in one request's text must not end the link of all
                self._fail(part.whole, _shown(error))

    def sequences_lost(self, sequence_ids: list[str], error: ShardFailedError) -> None:
        """Continue them elsewhere; with no shard left their requests fail."""
        is_over = not self._links.is_settling and not self._links.snapshots()
        logger.warning("sequences_lost num=%d continued=%s why=%s", len(sequence_ids), not is_over, error)
        for sequence_id in sequence_ids:
            if sequence_id not in self._open:
                continue
            if is_over:
                self._fail(self._open[sequence_id][0].whole, error)
            else:
                self._metrics.requests.resubmitted.inc()
                self._place(sequence_id)

    def links_settled(self) -> None:
        waiting, self._unplaced = self._unplaced, []
        for sequence_id in waiting:
            self._place(sequence_id)

    def _advance(self, part: OpenPart, choice: Choice, event: TokenEvent) -> None:
        """Take up what one step did for one choice."""
        if event.finish_reason is FinishReason.FAILED:
            self._fail(part.whole, error_of_text(event.error))
            return
        if event.finish_reason is FinishReason.CANCELLED:
            self._fail(part.whole, ShardFailedError("the shard gave the request up", fix="send the request again"))
            return
        self._journal.append(choice.sequence_id, event.token_ids)
        delta = choice.add(event)
        self._count(part, delta)
        part.whole.outbox.put(part.index, delta)
        if delta.finish_reason is not None:     # perhaps by a stop string, of which the shard knows nothing
            self._end(part, choice, delta.finish_reason, is_over_in_shard=event.finish_reason is not None)

    def _count(self, part: OpenPart, delta: GenerationDelta) -> None:
        if not delta.token_ids:
            return
        now_s, metrics, arrival_s = self._clock(), self._metrics.requests, part.whole.arrival_s
        before_s = part.last_token_s.get(delta.choice)
        part.last_token_s[delta.choice] = now_s
        if before_s is None:
            metrics.first_token_arrived(now_s - arrival_s, part.num_prompt_tokens, delta.num_cached_tokens or 0)
        num_later = len(delta.token_ids) - (before_s is None)
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
            self._admission.release(part.ticket)

    def _end(self, part: OpenPart, choice: Choice, reason: FinishReason, is_over_in_shard: bool = False) -> None:
        """End a choice: the one way out."""
        assert not choice.is_ended, "a choice ends once"
        choice.is_ended = True
        self._links.remove(choice.sequence_id, self._journal.close(choice.sequence_id), is_over_in_shard)
        del self._open[choice.sequence_id]
        self._metrics.requests.request_ended(reason, self._clock() - part.whole.arrival_s, choice.num_tokens)
        if all(other.is_ended for other in part.choices):
            self._admission.release(part.ticket)


def _shown(error: BaseException) -> ServingError:
    """Return the error for the client; a fault of ours is logged."""
    if isinstance(error, ServingError):
        return error
    logger.error("request_failed error=%r", error, exc_info=error)
    return ServingError(f"the router failed the request: {error!r:.200}")
