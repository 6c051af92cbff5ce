"""Decides who may enter: bounded by requests and tokens, fair between tenants, and not who would enter too late.

Who waits is let in as serving/fair_queue.py orders it, by tokens as they are expected; what a request has really cost
counts instead when it ends. Beside others each tenant has a part of every bound, by its weight. Nobody is kept from
using what others leave, and a tenant within its part enters at once, whatever another holds: the bounds hold for all
together up to their double. So a flood waits, and is refused, for its own tenant only.

A client's request of several prompts enters part by part. Its first part is judged by the load of others, and refused
when there is too much; the later ones wait for room, one at a time, and leave half of the tokens to others.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.config import AdmissionConfig
from serving.errors import DeadlineExceededError, InvalidRequestError, NotReadyError, OverloadedError
from serving.fair_queue import FairQueue
from serving.priority import DEFAULT_PRIORITY, DEFAULT_WEIGHT

logger = logging.getLogger(__name__)

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0
NUM_MEASURED_RELEASES = 64
NUM_MEASURED_ENDS = 16      # while somebody waits; with fewer nobody is refused for the time that others take


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
    cost: float                 # of the tokens, as expected
    is_later_part: bool = False
    priority: int = DEFAULT_PRIORITY
    weight: int = DEFAULT_WEIGHT        # of the tenant
    arrival_index: int = 0      # set when it is offered
    state: TicketState = TicketState.WAITING
    granted: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Drained:
    """What has ended since somebody waits: how fast those who wait will enter."""

    since_s: float
    num_ended: int = 0
    num_tokens: int = 0


@dataclass(slots=True)
class Held:
    """What one tenant has here."""

    num_open: int = 0
    num_queued: int = 0
    num_tokens: int = 0         # of both
    num_queued_tokens: int = 0
    weight: int = DEFAULT_WEIGHT        # as its newest request says


class Admission:
    """The admission of one router. A ticket is admitted or leaves the queue once, and is released once."""

    def __init__(self, config: AdmissionConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._queue: FairQueue[Ticket] = FairQueue()
        self._held: dict[str, Held] = {}                # by tenant; of those that have anything
        self._total_weight = 0                          # of these
        self._num_offered = 0
        self._releases: deque[tuple[float, int]] = deque(maxlen=NUM_MEASURED_RELEASES)   # (when, tokens)
        self.num_open = 0
        self.num_queued = 0
        self._num_open_tokens = 0
        self._num_queued_tokens = 0
        self._drained = Drained(clock())
        self._is_closed = False

    async def enter(self, ticket: Ticket, deadline_s: float) -> None:
        """Wait for admission, until `deadline_s` on the clock. The ticket must be released.

        Raises OverloadedError at once when over a bound, or when those before it will have entered too late,
        DeadlineExceededError when the deadline comes first. When the caller is cancelled the ticket leaves the queue.
        """
        self.offer(ticket)
        try:
            if ticket.state is TicketState.WAITING:
                self._refuse_too_late(ticket, deadline_s)
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
        held = self._held_by(ticket)
        self._total_weight += ticket.weight - held.weight
        held.weight = ticket.weight
        if not ticket.is_later_part:
            try:
                self._refuse_over_bounds(ticket)
            except OverloadedError:
                self._forget(ticket)
                raise
        if not self._queue:
            self._drained = Drained(self._clock())
        self._num_offered += 1
        ticket.arrival_index = self._num_offered
        self._queue.add(ticket, self._clock())
        self.num_queued += ticket.num_requests
        self._num_queued_tokens += ticket.num_tokens
        held.num_queued += ticket.num_requests
        held.num_queued_tokens += ticket.num_tokens
        held.num_tokens += ticket.num_tokens
        self._admit()

    def release(self, ticket: Ticket, cost: float | None = None) -> None:
        """Give a place back that is not needed any more, had or waited for. Releasing twice changes nothing.

        `cost`: of the tokens, as it was; None: as expected."""
        if ticket.state is TicketState.ENDED:
            return
        if ticket.state is TicketState.WAITING:
            self._leave_queue(ticket)
        elif ticket.state is TicketState.ADMITTED:
            self.num_open -= ticket.num_requests
            self._num_open_tokens -= ticket.num_tokens
            self._releases.append((self._clock(), ticket.num_tokens))
            self._drained.num_ended += 1
            self._drained.num_tokens += ticket.num_tokens
            self._held_by(ticket).num_open -= ticket.num_requests
            self._held_by(ticket).num_tokens -= ticket.num_tokens
            self._queue.charge(ticket, 0.0 if cost is None else cost - ticket.cost)
        self._forget(ticket)
        ticket.state = TicketState.ENDED
        self._admit()

    def close(self) -> None:
        """Turn away everybody who waits, and everybody who comes."""
        self._is_closed = True
        for ticket in list(self._queue):
            self._leave_queue(ticket)
            self._forget(ticket)
            ticket.state = TicketState.ENDED
            ticket.granted.set()

    def _retry_after_s(self, held: Held) -> float:
        """Return in how long all of a tenant that waits will have entered, at the rate of ends: it has its part of that
        rate, and what others leave. Between 1 s and 60 s."""
        if len(self._releases) < 2:
            return MIN_RETRY_AFTER_S
        first_s = self._releases[0][0]
        num_tokens = sum(tokens for _, tokens in self._releases) - self._releases[0][1]
        elapsed_s = self._clock() - first_s
        if num_tokens <= 0:
            return MIN_RETRY_AFTER_S
        num_before = min(self._num_queued_tokens, held.num_queued_tokens * self._total_weight / held.weight)
        return min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, num_before * elapsed_s / num_tokens))

    def _refuse_closed(self, is_closed: bool) -> None:
        if is_closed:
            raise NotReadyError("this router is shutting down", fix="send the request again")

    def _refuse_over_bounds(self, ticket: Ticket) -> None:
        config, more, tenant = self._config, ticket.num_requests, self._held_by(ticket)
        must_wait = bool(self._queue) or self.num_open + more > config.max_open_requests
        num_held, num_tokens = self._num_open_tokens + self._num_queued_tokens, ticket.num_tokens
        if must_wait and self._is_over(config.max_queued_requests, self.num_queued, tenant, tenant.num_queued, more):
            over = f"{self.num_queued} requests wait already; at most {config.max_queued_requests} may"
        elif num_held and self._is_over(config.max_queued_tokens, num_held, tenant, tenant.num_tokens, num_tokens):
            over = f"open and waiting requests hold {num_held} tokens, and this one {num_tokens}; " \
                   f"at most {config.max_queued_tokens} may be held"     # alone, any request may enter
        else:
            return
        retry_after_s = self._retry_after_s(tenant)
        if len(self._held) > 1:
            over += f", and a tenant has its part beside {len(self._held) - 1} others"
        raise OverloadedError(over, retry_after_s=retry_after_s, fix=f"try again in {retry_after_s:.0f} s")

    def _is_over(self, bound: int, of_all: int, tenant: Held, of_tenant: int, more: int) -> bool:
        """Return whether `more` is beyond a bound, and not within the tenant's part of it. Its first is."""
        is_within_part = not of_tenant or of_tenant + more <= self._part(bound, tenant)
        return of_all + more > bound and not (is_within_part and of_all + more <= 2 * bound)

    def _part(self, bound: int, tenant: Held) -> int:
        """Return a tenant's part of a bound, beside all others that have anything here."""
        return bound * tenant.weight // self._total_weight

    def _refuse_too_late(self, ticket: Ticket, deadline_s: float) -> None:
        """Raise OverloadedError when those who are before a ticket will have entered after its deadline."""
        now_s, drained = self._clock(), self._drained
        if drained.num_ended < NUM_MEASURED_ENDS or not drained.num_tokens:
            return
        wait_s = self._num_tokens_before(ticket) * (now_s - drained.since_s) / drained.num_tokens
        if now_s + wait_s > deadline_s:
            after_s = min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, now_s + wait_s - deadline_s))
            raise OverloadedError(
                f"the request would wait {wait_s:.0f} s for admission, and its deadline is in "
                f"{deadline_s - now_s:.0f} s", retry_after_s=after_s,
                fix=f"allow more time, or try again in {after_s:.0f} s")

    def _num_tokens_before(self, ticket: Ticket) -> float:
        """Return the tokens of all that enter before a ticket that has just come, as the queue orders them now."""
        queues = [queue for queue in self._queue.queues(self._clock()) if queue[0].priority <= ticket.priority]
        own = next(queue for queue in queues if queue[-1] is ticket)
        own_cost = self._queue.served_cost(ticket) + sum(one.cost / one.weight for one in own[:-1])
        before = 0.0
        for queue in queues:
            cost = self._queue.served_cost(queue[0])
            for one in queue:
                if one is ticket or (one.priority == ticket.priority and cost >= own_cost and queue is not own):
                    break
                cost += one.cost / one.weight
                before += one.num_tokens
        return before

    def _admit(self) -> None:
        """Let in whoever is next, while there is room."""
        while (ticket := self._next()) is not None:
            self._leave_queue(ticket)
            self._queue.charge(ticket, ticket.cost)
            self._queue.served(ticket.priority, self._clock())
            self.num_open += ticket.num_requests
            self._num_open_tokens += ticket.num_tokens
            self._held_by(ticket).num_open += ticket.num_requests
            self._held_by(ticket).num_tokens += ticket.num_tokens
            ticket.state = TicketState.ADMITTED
            ticket.granted.set()

    def _next(self) -> Ticket | None:
        """Return who may enter now. The next in turn is never overtaken, or it might starve, but by other tenants that
        are within their part."""
        blocked: set[str] = set()
        for queue in self._queue.queues(self._clock()):
            ticket = queue[0]
            if ticket.tenant in blocked:
                continue
            if self._has_part(ticket) or (not blocked and self._has_room(ticket)):
                return ticket
            blocked.add(ticket.tenant)
        return None

    def _has_room(self, ticket: Ticket) -> bool:
        return self.num_open + ticket.num_requests <= self._config.max_open_requests and self._has_tokens(ticket)

    def _has_part(self, ticket: Ticket) -> bool:
        """Return whether a ticket leaves its tenant within its part; its first one does."""
        bound, held = self._config.max_open_requests, self._held_by(ticket)
        is_within = not held.num_open or held.num_open + ticket.num_requests <= self._part(bound, held)
        return is_within and self.num_open + ticket.num_requests <= 2 * bound and self._has_tokens(ticket)

    def _has_tokens(self, ticket: Ticket) -> bool:
        num_tokens = self._num_open_tokens + ticket.num_tokens
        return not ticket.is_later_part or not self.num_open or num_tokens <= self._config.max_queued_tokens // 2

    def _leave_queue(self, ticket: Ticket) -> None:
        self._queue.remove(ticket)
        self.num_queued -= ticket.num_requests
        self._num_queued_tokens -= ticket.num_tokens
        self._held_by(ticket).num_queued -= ticket.num_requests
        self._held_by(ticket).num_queued_tokens -= ticket.num_tokens
        self._held_by(ticket).num_tokens -= ticket.num_tokens

    def _held_by(self, ticket: Ticket) -> Held:
        held = self._held.get(ticket.tenant)
        if held is None:
            held = self._held[ticket.tenant] = Held(weight=ticket.weight)
            self._total_weight += ticket.weight
        return held

    def _forget(self, ticket: Ticket) -> None:
        """Forget a tenant that holds nothing."""
        held = self._held_by(ticket)
        if not held.num_open and not held.num_queued:
            del self._held[ticket.tenant]
            self._total_weight -= held.weight
