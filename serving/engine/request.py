"""A request as a shard's engine sees it, its status table, and the events it produces."""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from model.step import SamplingSpec, TokenLogprob
from serving.errors import ServingError
from serving.priority import DEFAULT_PRIORITY, DEFAULT_WEIGHT, aged_arrival_s

logger = logging.getLogger(__name__)


class IllegalTransition(ServingError):
    pass


class RequestStatus(enum.StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"     # its blocks were taken; it waits to be recomputed
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


NEXT: dict[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.WAITING: frozenset({RequestStatus.RUNNING, RequestStatus.CANCELLED, RequestStatus.FAILED}),
    RequestStatus.RUNNING: frozenset({RequestStatus.PREEMPTED, RequestStatus.FINISHED, RequestStatus.CANCELLED,
                                      RequestStatus.FAILED}),
    RequestStatus.PREEMPTED: frozenset({RequestStatus.RUNNING, RequestStatus.CANCELLED, RequestStatus.FAILED}),
    RequestStatus.FINISHED: frozenset(),
    RequestStatus.CANCELLED: frozenset(),
    RequestStatus.FAILED: frozenset(),
}


class FinishReason(enum.StrEnum):
    """Says why a sequence ended; the OpenAI API's words, and two of our own."""

    STOP = "stop"               # an end-of-sequence or stop token, or a stop string
    LENGTH = "length"           # max_tokens or the context is used up
    CANCELLED = "cancelled"
    FAILED = "failed"


STATUS_AT_END = {
    FinishReason.STOP: RequestStatus.FINISHED, FinishReason.LENGTH: RequestStatus.FINISHED,
    FinishReason.CANCELLED: RequestStatus.CANCELLED, FinishReason.FAILED: RequestStatus.FAILED}


@dataclass(frozen=True, slots=True)
class Submission:
    """A sequence to continue, as a router sends it to a shard.

    `journal_token_ids` are output tokens that the sequence produced before, on another shard or in another epoch: they
    are computed, not drawn again, so the first new token has position len(prompt) + len(journal).
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingSpec
    max_tokens: int                             # output tokens in all, the journal's included
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()        # the model's end-of-sequence ids included unless ignore_eos
    journal_token_ids: tuple[int, ...] = ()
    num_prompt_logprobs: int | None = None
    deadline_s: float | None = None             # on the engine's clock; past it the engine fails the request
    source_shard_id: str = ""                   # the member that has its KV blocks; "": none is known
    priority: int = DEFAULT_PRIORITY            # the lower the earlier
    tenant: int = 0                             # whose it is, as a number that says nothing else
    traceparent: str = ""                       # W3C header of the trace that its spans belong to; "": not traced
    weight: int = DEFAULT_WEIGHT                # of the tenant: how large its part is beside others'


class TokenEvent(NamedTuple):
    """Says what one step did for one sequence. `finish_reason` is set in its last event, once. (A named tuple: one is
    made for every token, at both ends of the link.)"""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()             # one for each of token_ids, when asked for
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int | None = None                # prompt tokens served by the prefix cache; in the first event
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None                    # which stop token ended it; it is not among token_ids' text
    error: str = ""                                     # with FAILED
    num_received_tokens: int = 0                        # whose KV blocks another member has sent; in the first event


@dataclass(slots=True, eq=False)
class Request:
    """A sequence in a scheduler. Only the scheduler changes it, and tokens only after a step has succeeded."""

    submission: Submission
    router_id: str
    arrival_s: float
    status: RequestStatus = RequestStatus.WAITING
    is_ready: bool = True                                       # False: what it needs is being prepared
    output_token_ids: list[int] = field(default_factory=list)   # starts as the journal
    num_computed_tokens: int = 0
    block_table: tuple[int, ...] = ()                           # a step's plan holds it too
    num_preemptions: int = 0
    arrival_index: int = 0                                      # order in which the scheduler accepted it
    block_hashes: list[bytes] = field(default_factory=list)     # chained, of its full blocks, as far as known
    snapshot_positions: tuple[int, ...] = ()                    # where its prompt's state is worth keeping
    num_received_tokens: int = 0                                # whose KV blocks another member has sent
    num_cached_tokens: int = 0                                  # prompt tokens that the prefix cache served at first
    num_charged_tokens: int = 0                                 # known ones that its tenant was charged for
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)   # until the first token takes them along

    @property
    def request_id(self) -> str:
        return self.submission.request_id

    @property
    def tenant(self) -> int:
        return self.submission.tenant

    @property
    def priority(self) -> int:
        return self.submission.priority

    @property
    def weight(self) -> int:
        return self.submission.weight

    @property
    def kind(self) -> tuple[int, int, int]:
        """Return its tenant, its priority, and the tenant's weight."""
        return self.tenant, self.priority, self.weight

    @property
    def turn(self) -> tuple[float, int]:
        """Return what orders those that run: whose is lowest gives its blocks back last."""
        return aged_arrival_s(self.arrival_s, self.priority), self.arrival_index

    @property
    def num_tokens(self) -> int:
        return len(self.submission.prompt_token_ids) + len(self.output_token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Return whether they are still due: they travel with the first token, also with one of the journal."""
        return self.submission.num_prompt_logprobs is not None and not self.output_token_ids

    def next_sampling(self) -> SamplingSpec:
        """Return how its next token is drawn: too few so far, and no stop token may be."""
        submission = self.submission
        if len(self.output_token_ids) >= submission.min_tokens or not submission.stop_token_ids:
            return submission.sampling
        banned = submission.sampling.banned_token_ids + submission.stop_token_ids
        return replace(submission.sampling, banned_token_ids=banned)

    def finish_reason(self) -> FinishReason | None:
        """Judge the last output token. max_tokens ends it within max_model_len: CacheRoom.check has made sure."""
        submission, num_output = self.submission, len(self.output_token_ids)
        if self.output_token_ids[-1] in submission.stop_token_ids and num_output > submission.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_output >= submission.max_tokens else None

    def stop_token_id(self, reason: FinishReason | None) -> int | None:
        """Return the token that ended it, where one did."""
        return self.output_token_ids[-1] if reason is FinishReason.STOP else None

    def token_ids(self, start: int, end: int) -> tuple[int, ...]:
        """Return known tokens at positions start to end - 1, without building the whole sequence."""
        prompt = self.submission.prompt_token_ids
        output = self.output_token_ids[max(0, start - len(prompt)):max(0, end - len(prompt))]
        return (*prompt[start:end], *output)

    def advance(self, to: RequestStatus, why: str) -> None:
        if to not in NEXT[self.status]:
            allowed = ", ".join(sorted(NEXT[self.status])) or "none, it has ended"
            raise IllegalTransition(f"request {self.request_id}: {self.status} -> {to} ({why})",
                                    fix=f"allowed next: {allowed}")
        logger.debug("request_status request_id=%s old=%s new=%s why=%s", self.request_id, self.status, to, why)
        self.status = to
