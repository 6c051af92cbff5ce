"""A request as a shard's engine sees it, its status table, and the events it produces."""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass, field

from model.step import SamplingSpec, TokenLogprob
from serving.errors import ServingError

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


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Says what one step did for one sequence. `finish_reason` is set in its last event, once."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()             # one for each of token_ids, when asked for
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int | None = None                # prompt tokens served by the prefix cache; in the first event
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None                    # which stop token ended it; it is not among token_ids' text
    error: str = ""                                     # with FAILED


@dataclass(slots=True, eq=False)
class Request:
    """A sequence in a scheduler. Only the scheduler changes it, and tokens only after a step has succeeded."""

    submission: Submission
    router_id: str
    arrival_s: float
    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)   # starts as the journal
    num_computed_tokens: int = 0
    block_table: tuple[int, ...] = ()                           # a step's plan holds it too
    num_preemptions: int = 0
    arrival_index: int = 0                                      # order in which the scheduler accepted it
    block_hashes: list[bytes] = field(default_factory=list)     # chained, of its full blocks, as far as known
    snapshot_positions: tuple[int, ...] = ()                    # where its prompt's state is worth keeping
    num_cached_tokens: int = 0                                  # prompt tokens that the prefix cache served at first
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)   # until the first token takes them along

    @property
    def request_id(self) -> str:
        return self.submission.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.submission.prompt_token_ids) + len(self.output_token_ids)

    def advance(self, to: RequestStatus, why: str) -> None:
        if to not in NEXT[self.status]:
            allowed = ", ".join(sorted(NEXT[self.status])) or "none, it has ended"
            raise IllegalTransition(f"request {self.request_id}: {self.status} -> {to} ({why})",
                                    fix=f"allowed next: {allowed}")
        logger.debug("request_status request_id=%s old=%s new=%s why=%s", self.request_id, self.status, to, why)
        self.status = to
