"""Decides who may enter: bounded by requests and tokens, fair between tenants, with deadlines.

Fairness is start-time fair queueing (Goyal et al., 1996) with tokens as the service: every tenant has a tag that its
requests push forward by their tokens, and the tenant whose tag is smallest enters next. A tenant that was away starts
at the present, so it neither saves up turns nor waits behind others' backlogs.

A client's request of several prompts enters part by part. Its first part is judged by the load of others, and refused
when there is too much; the later ones wait for room, one at a time, and leave half of the tokens to others.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.config import AdmissionConfig
from serving.errors import DeadlineExceededError, InvalidRequestError, NotReadyError, OverloadedError

logger = logging.getLogger(__name__)

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0
NUM_MEASURED_RELEASES = 64


class TicketState(enum.StrEnum):
    WAITING = "waiting"
    ADMITTED = "admitted"
    ENDED = "ended"


@dataclass(eq=False, slots=True)
class Ticket:
    """The place of one part of a client's request: `num_requests` choices and their tokens."""

    tenant: str
    num_requests: int
    num_tokens: int
    is_later_part: bool = False
    state: TicketState = TicketState.WAITING
    granted: asyncio.Event = field(default_factory=asyncio.Event)


class Admission:
    """The admission of one router. A ticket is admitted or leaves the queue once, and is released once."""

    def __init__(self, config: AdmissionConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._queues: dict[str, OrderedDict[Ticket, None]] = {}     # tenants with waiting tickets; FIFO each
        self._tags: dict[str, float] = {}
        self._now_tag = 0.0
        self._releases: deque[tuple[float, int]] = deque(maxlen=NUM_MEASURED_RELEASES)   # (when, tokens)
        self.num_open = 0
        self.num_queued = 0
        self._num_open_tokens = 0
        self._num_queued_tokens = 0
        self._is_closed = False

    async def enter(self, ticket: Ticket, deadline_s: float) -> None:
        """Wait for admission, until `deadline_s` on the clock. The ticket must be released.

        Raises OverloadedError at once when over a bound, DeadlineExceededError when the deadline comes first. When the
        caller is cancelled the ticket leaves the queue.
        """
        self.offer(ticket)
        try:
            if ticket.state is TicketState.WAITING:
                async with asyncio.timeout(max(0.0, deadline_s - self._clock())):
                    await ticket.granted.wait()
            self._refuse_closed(ticket.state is TicketState.ENDED)
        except TimeoutError:
            self.release(ticket)
            raise DeadlineExceededError(
                "the request's deadline passed while it waited for admission",
                fix="allow more time, or come back when there is less load") from None
        except BaseException:
            self.release(ticket)
            raise

    def offer(self, ticket: Ticket) -> None:
        """Queue a request, admit what may enter. Raises OverloadedError; InvalidRequestError for too many choices."""
        self._refuse_closed(self._is_closed)
        if ticket.num_requests > self._config.max_open_requests:
            raise InvalidRequestError(
                f"n={ticket.num_requests} choices are more than this server runs at once "
                f"({self._config.max_open_requests})",
                fix=f"ask for at most {self._config.max_open_requests}", param="n")
        if not ticket.is_later_part:
            self._refuse_over_bounds(ticket.num_requests, ticket.num_tokens)
        if ticket.tenant not in self._queues:
            self._queues[ticket.tenant] = OrderedDict()
            self._tags[ticket.tenant] = max(self._now_tag, self._tags.get(ticket.tenant, 0.0))
        self._queues[ticket.tenant][ticket] = None
        self.num_queued += ticket.num_requests
        self._num_queued_tokens += ticket.num_tokens
        self._admit()

    def release(self, ticket: Ticket) -> None:
        """Give a place back that is not needed any more, had or waited for. Releasing twice changes nothing."""
        if ticket.state is TicketState.WAITING:
            self._leave_queue(ticket)
        elif ticket.state is TicketState.ADMITTED:
            self.num_open -= ticket.num_requests
            self._num_open_tokens -= ticket.num_tokens
            self._releases.append((self._clock(), ticket.num_tokens))
        ticket.state = TicketState.ENDED
        self._admit()

    def close(self) -> None:
        """Turn away everybody who waits, and everybody who comes."""
        self._is_closed = True
        for ticket in [ticket for queue in self._queues.values() for ticket in queue]:
            self._leave_queue(ticket)
            ticket.state = TicketState.ENDED
            ticket.granted.set()

    def retry_after_s(self) -> float:
        """Return in how long all that waits will have entered, at the rate of ends. Between 1 s and 60 s."""
        if len(self._releases) < 2:
            return MIN_RETRY_AFTER_S
        first_s = self._releases[0][0]
        num_tokens = sum(tokens for _, tokens in self._releases) - self._releases[0][1]
        elapsed_s = self._clock() - first_s
        if num_tokens <= 0:
            return MIN_RETRY_AFTER_S
        return min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, self._num_queued_tokens * elapsed_s / num_tokens))

    def _refuse_closed(self, is_closed: bool) -> None:
        if is_closed:
            raise NotReadyError("this router is shutting down", fix="send the request again")

    def _refuse_over_bounds(self, num_requests: int, num_tokens: int) -> None:
        config, num_held = self._config, self._num_open_tokens + self._num_queued_tokens
        must_wait = bool(self._queues) or self.num_open + num_requests > config.max_open_requests
        if must_wait and self.num_queued + num_requests > config.max_queued_requests:
            over = f"{self.num_queued} requests wait already; at most {config.max_queued_requests} may"
        elif num_held and num_held + num_tokens > config.max_queued_tokens:     # alone, any request may enter
            over = f"open and waiting requests hold {num_held} tokens, and this one {num_tokens}; " \
                   f"at most {config.max_queued_tokens} may be held"
        else:
            return
        retry_after_s = self.retry_after_s()
        raise OverloadedError(over, retry_after_s=retry_after_s, fix=f"try again in {retry_after_s:.0f} s")

    def _admit(self) -> None:
        """Let in whoever is next, while there is room. The next one is never overtaken, or it might starve."""
        while self._queues:
            tenant = min(self._queues, key=self._tags.__getitem__)
            ticket = next(iter(self._queues[tenant]))
            if not self._has_room(ticket):
                return
            self._leave_queue(ticket)
            self._now_tag = max(self._now_tag, self._tags[tenant])
            self._tags[tenant] += ticket.num_tokens
            self._forget_old_tags()
            self.num_open += ticket.num_requests
            self._num_open_tokens += ticket.num_tokens
            ticket.state = TicketState.ADMITTED
            ticket.granted.set()

    def _has_room(self, ticket: Ticket) -> bool:
        if self.num_open + ticket.num_requests > self._config.max_open_requests:
            return False
        num_tokens = self._num_open_tokens + ticket.num_tokens
        return not ticket.is_later_part or not self.num_open or num_tokens <= self._config.max_queued_tokens // 2

    def _leave_queue(self, ticket: Ticket) -> None:
        queue = self._queues[ticket.tenant]
        del queue[ticket]
        if not queue:
            del self._queues[ticket.tenant]
        self.num_queued -= ticket.num_requests
        self._num_queued_tokens -= ticket.num_tokens

    def _forget_old_tags(self) -> None:
        """Tags in the past mean nothing; dropped in bulk, so that tenants who come and go cost no memory."""
        if len(self._tags) > 2 * len(self._queues) + 64:
            self._tags = {tenant: tag for tenant, tag in self._tags.items()
                          if tag > self._now_tag or tenant in self._queues}
