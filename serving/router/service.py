"""The router's service, which both doors call: admission -> shard choice -> journal -> shard link -> text.

Every sequence lives in the journal from its submission to its end, whichever shard computes it. Every accepted choice
ends exactly once, in `_end`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from serving.config import RouterConfig
from serving.engine.request import FinishReason, TokenEvent
from serving.errors import DeadlineExceededError, NotReadyError, ServingError, ShardFailedError
from serving.link.epoch import Epoch
from serving.link.messages import error_of_text
from serving.metrics import RouterMetrics
from serving.router.admission import Admission
from serving.router.choice import Choice
from serving.router.generation import GenerationDelta, GenerationRequest, ModelCard
from serving.router.journal import Journal
from serving.router.open_request import OpenRequest, new_choice, new_submission
from serving.router.request_checks import check_request
from serving.router.shard_choice import ShardSnapshot, block_hashes
from serving.router.shard_links import CONNECT_WAIT_S, ShardLinks
from serving.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# A request that sets no max_tokens may use the whole context, but few do: it is admitted as if it wanted so many.
ADMITTED_OUTPUT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class RouterSnapshot:
    """For status displays."""

    epoch_number: int            # 0 before the first
    is_ready: bool
    num_open: int
    num_queued: int
    shards: tuple[ShardSnapshot, ...]


class InferenceService:
    """One model, one router replica. Runs on one event loop."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, config: RouterConfig, block_size: int,
                 metrics: RouterMetrics, clock: Callable[[], float]) -> None:
        self._card = card
        self._tokenizer = tokenizer
        self._config = config
        self._block_size = block_size
        self._metrics = metrics
        self._clock = clock
        # Part of every sequence's id, so that ids of different routers, and of one before and after a restart, differ.
        self.router_id = secrets.token_hex(4)
        self._num_requests = 0
        self._admission = Admission(config.admission, clock)
        # Asked when it is read: requests that wait have nobody who could set it.
        metrics.requests.num_queued.set_function(lambda: self._admission.num_queued)
        self._journal = Journal()
        self._links = ShardLinks(self.router_id, config.stream_window, block_size, clock, self, metrics.shards)
        self._open: dict[str, tuple[OpenRequest, Choice]] = {}      # by sequence id
        self._unplaced: list[str] = []                              # sequences that wait for a new epoch's links

    @property
    def cards(self) -> tuple[ModelCard, ...]:
        return (self._card,)

    def is_ready(self) -> bool:
        return self._links.is_ready

    def snapshot(self) -> RouterSnapshot:
        epoch = self._links.epoch
        return RouterSnapshot(epoch.number if epoch else 0, self.is_ready(), self._admission.num_open,
                              self._admission.num_queued, self._links.snapshots())

    async def set_epoch(self, epoch: Epoch, connect_wait_s: float = CONNECT_WAIT_S) -> None:
        """Go over to a newer epoch; what is open is continued there. An older one is ignored."""
        self._metrics.epoch_number.set(max(epoch.number, self._links.epoch.number if self._links.epoch else 0))
        await self._links.set_epoch(epoch, connect_wait_s)

    async def close(self) -> None:
        """End everything that is open."""
        self._admission.close()
        for open_request, _ in list(self._open.values()):
            self._fail(open_request, NotReadyError("this router is shutting down", fix="send the request again"))
        await self._links.close()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        """Stream the choices. Closing the iterator cancels them. Raises ServingError, at once or later."""
        open_request = await self._accept(request)
        try:
            self._start(open_request)
            num_unfinished = request.params.n
            while num_unfinished:
                item = await open_request.outbox.get()
                if isinstance(item, ServingError):
                    raise item
                num_unfinished -= item.finish_reason is not None
                yield item
        finally:
            self._abandon(open_request, FinishReason.CANCELLED)

    # From the door to the shards.

    async def _accept(self, request: GenerationRequest) -> OpenRequest:
        """Check and admit. Raises ServingError."""
        arrival_s, params = self._clock(), request.params
        deadline_s = arrival_s + (self._config.admission.default_deadline_s if request.deadline_s is None
                                  else request.deadline_s)
        try:
            check_request(request, self._card, self._tokenizer.num_embeddings, self._links.max_request_tokens)
            if self._links.epoch is None:
                raise NotReadyError("the shards are still starting", fix="try again; `moesaic status` shows them")
            num_tokens = params.n * (len(request.prompt_token_ids) + self._num_expected(request))
            ticket = await self._admission.enter(request.tenant, params.n, num_tokens, deadline_s)
        except ServingError as error:
            self._metrics.requests.request_refused(error)
            raise
        hashes = block_hashes(request.prompt_token_ids, self._block_size)
        open_request = OpenRequest(request, ticket, arrival_s, deadline_s, hashes)
        open_request.deadline_timer = asyncio.get_running_loop().call_later(
            max(0.0, deadline_s - self._clock()), self._expire, open_request)
        return open_request

    def _num_expected(self, request: GenerationRequest) -> int:
        room = self._card.max_model_len - len(request.prompt_token_ids)
        return min(room, ADMITTED_OUTPUT_TOKENS) if request.params.max_tokens is None else request.params.max_tokens

    def _start(self, open_request: OpenRequest) -> None:
        """Make the choices and send them to shards. Each is accepted here, and from here on ends exactly once."""
        params = open_request.request.params
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._num_requests += 1
        for index in range(params.n):
            sequence_id = f"{self.router_id}-{self._num_requests}-{open_request.request.request_id}-{index}"
            choice = new_choice(open_request.request, index, sequence_id, self._tokenizer)
            self._journal.open(new_submission(open_request, sequence_id, seed + index, self._card.max_model_len,
                                              self._tokenizer.eos_token_ids))
            self._open[sequence_id] = (open_request, choice)
            open_request.choices.append(choice)
            self._metrics.requests.admitted(open_request.num_prompt_tokens, self._clock() - open_request.arrival_s)
        for choice in open_request.choices:
            self._place(choice.sequence_id)

    def _place(self, sequence_id: str) -> None:
        """Send a sequence, with what it has produced, to the best shard; if none can be had, its request fails."""
        open_request, choice = self._open.get(sequence_id, (None, None))
        if open_request is None or choice is None:
            return
        if self._links.is_settling:
            self._unplaced.append(sequence_id)
            return
        try:
            self._links.place(self._journal.resubmission(sequence_id), open_request.hashes,
                              may_shorten=open_request.request.params.max_tokens is None)
        except ServingError as error:
            self._fail(open_request, error)

    # From the shards to the door: LinksOwner.

    def sequence_events(self, events: list[TokenEvent]) -> None:
        for event in events:
            if event.request_id not in self._open:
                continue
            open_request, choice = self._open[event.request_id]
            try:
                self._advance(open_request, choice, event)
            except Exception as error:      # a fault in one request's text must not end the link of all
                logger.exception("request_failed request_id=%s", event.request_id)
                self._fail(open_request, ServingError(f"the router failed the request: {error!r}"))

    def sequences_lost(self, sequence_ids: list[str], error: ShardFailedError) -> None:
        """Continue them elsewhere; with no shard left their requests fail."""
        is_over = not self._links.is_settling and not self._links.snapshots()
        logger.warning("sequences_lost num=%d continued=%s why=%s", len(sequence_ids), not is_over, error)
        for sequence_id in sequence_ids:
            if sequence_id not in self._open:
                continue
            if is_over:
                self._fail(self._open[sequence_id][0], error)
            else:
                self._metrics.requests.resubmitted.inc()
                self._place(sequence_id)

    def links_settled(self) -> None:
        waiting, self._unplaced = self._unplaced, []
        for sequence_id in waiting:
            self._place(sequence_id)

    def _advance(self, open_request: OpenRequest, choice: Choice, event: TokenEvent) -> None:
        """One step of one choice."""
        if event.finish_reason is FinishReason.FAILED:
            self._fail(open_request, error_of_text(event.error))
            return
        if event.finish_reason is FinishReason.CANCELLED:
            self._fail(open_request, ShardFailedError("the shard gave the request up", fix="send the request again"))
            return
        self._journal.append(choice.sequence_id, event.token_ids)
        delta = choice.add(event)
        self._count(open_request, delta)
        open_request.outbox.put_nowait(delta)
        if delta.finish_reason is not None:     # perhaps by a stop string, of which the shard knows nothing
            self._end(open_request, choice, delta.finish_reason, is_over_in_shard=event.finish_reason is not None)

    def _count(self, open_request: OpenRequest, delta: GenerationDelta) -> None:
        if not delta.token_ids:
            return
        now_s, metrics = self._clock(), self._metrics.requests
        before_s = open_request.last_token_s.get(delta.choice)
        open_request.last_token_s[delta.choice] = now_s
        if before_s is None:
            metrics.first_token_arrived(now_s - open_request.arrival_s, open_request.num_prompt_tokens,
                                        delta.num_cached_tokens or 0)
        num_later = len(delta.token_ids) - (before_s is None)
        if num_later:
            metrics.tokens_arrived(num_later, now_s - (open_request.arrival_s if before_s is None else before_s))

    # Ends.

    def _expire(self, open_request: OpenRequest) -> None:
        num_tokens = sum(choice.num_tokens for choice in open_request.choices)
        self._fail(open_request, DeadlineExceededError(
            f"the request's deadline passed after {num_tokens} tokens", fix="allow more time or ask for fewer tokens"))

    def _fail(self, open_request: OpenRequest, error: ServingError) -> None:
        open_request.outbox.put_nowait(error)
        self._abandon(open_request, FinishReason.FAILED)

    def _abandon(self, open_request: OpenRequest, reason: FinishReason) -> None:
        """End the choices that have not ended, here and in the shards."""
        for choice in open_request.choices:
            if not choice.is_ended:
                self._end(open_request, choice, reason)
        self._release(open_request)

    def _end(self, open_request: OpenRequest, choice: Choice, reason: FinishReason,
             is_over_in_shard: bool = False) -> None:
        """The one way out of a choice."""
        assert not choice.is_ended, "a choice ends once"
        choice.is_ended = True
        self._links.remove(choice.sequence_id, self._journal.close(choice.sequence_id), is_over_in_shard)
        del self._open[choice.sequence_id]
        self._metrics.requests.request_ended(reason, self._clock() - open_request.arrival_s, choice.num_tokens)
        if all(other.is_ended for other in open_request.choices):
            self._release(open_request)

    def _release(self, open_request: OpenRequest) -> None:
        """Give the request's place to the next; more than once changes nothing."""
        if open_request.deadline_timer is not None:
            open_request.deadline_timer.cancel()
        self._admission.release(open_request.ticket)
