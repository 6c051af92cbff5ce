from __future__ import annotations

import asyncio
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config import AdmissionConfig
from serving.errors import DeadlineExceededError, InvalidRequestError, NotReadyError, OverloadedError
from serving.router.admission import Admission, Ticket, TicketState


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def admission(max_open: int = 2, max_queued: int = 100, max_tokens: int = 10**9) -> tuple[Admission, Clock]:
    clock = Clock()
    config = AdmissionConfig(max_open_requests=max_open, max_queued_requests=max_queued, max_queued_tokens=max_tokens)
    return Admission(config, clock), clock


def offer(door: Admission, tenant: str, num_requests: int, num_tokens: int, is_later_part: bool = False,
          priority: int = 0, weight: int = 1) -> Ticket:
    ticket = Ticket(tenant, num_requests, num_tokens, float(num_tokens), is_later_part, priority, weight)
    door.offer(ticket)
    return ticket


async def enter(door: Admission, deadline_s: float) -> Ticket:
    ticket = Ticket("t", 1, 10, 10.0)
    await door.enter(ticket, deadline_s)
    return ticket


def states(*tickets: Ticket) -> list[str]:
    return [ticket.state.value for ticket in tickets]


def test_requests_enter_while_there_is_room_and_then_in_order() -> None:
    door, _ = admission(max_open=2)
    first, second, third, fourth = (offer(door, "t", 1, 10) for _ in range(4))
    assert states(first, second, third, fourth) == ["admitted", "admitted", "waiting", "waiting"]
    door.release(second)
    assert states(third, fourth) == ["admitted", "waiting"]
    assert (door.num_open, door.num_queued) == (2, 1)


def test_over_the_bound_of_waiting_requests_is_refused_at_once() -> None:
    door, _ = admission(max_open=1, max_queued=1)
    offer(door, "t", 1, 10)
    offer(door, "t", 1, 10)
    with pytest.raises(OverloadedError, match="1 requests wait already; at most 1 may") as refusal:
        offer(door, "t", 1, 10)
    assert refusal.value.retry_after_s == 1.0


def test_tokens_are_bounded_but_one_request_alone_may_enter() -> None:
    door, _ = admission(max_tokens=100)
    alone = offer(door, "t", 1, 500)
    with pytest.raises(OverloadedError, match="hold 500 tokens, and this one 1"):
        offer(door, "t", 1, 1)
    door.release(alone)
    offer(door, "t", 1, 100)


def test_more_choices_than_can_ever_run_are_the_clients_error() -> None:
    door, _ = admission(max_open=4)
    with pytest.raises(InvalidRequestError, match="at most 4"):
        offer(door, "t", 5, 10)


def test_a_wide_request_is_not_starved_by_narrow_ones() -> None:
    door, _ = admission(max_open=2)
    first, second = offer(door, "t", 1, 10), offer(door, "t", 1, 10)
    wide, narrow = offer(door, "t", 2, 10), offer(door, "t", 1, 10)
    door.release(first)
    assert states(wide, narrow) == ["waiting", "waiting"]
    door.release(second)
    assert states(wide, narrow) == ["admitted", "waiting"]


def test_tenants_share_by_tokens_not_by_how_much_they_ask() -> None:
    """Each has its part, one place, and both want the third."""
    door, _ = admission(max_open=3)
    running = [offer(door, "greedy", 1, 100) for _ in range(2)][-1]
    offer(door, "modest", 1, 50)
    greedy = [offer(door, "greedy", 1, 100) for _ in range(20)]
    modest = [offer(door, "modest", 1, 50) for _ in range(20)]
    for _ in range(9):
        door.release(running)
        running = next(ticket for ticket in (*greedy, *modest) if ticket.state is TicketState.ADMITTED)
    entered = [sum(ticket.state is not TicketState.WAITING for ticket in tickets) for tickets in (greedy, modest)]
    assert entered == [4, 5]       # 200 tokens were 50 ahead of 250 at first


@pytest.mark.parametrize(("cost", "is_next"), [(None, [True, False]), (0.0, [True, False]), (500.0, [False, True])])
def test_what_a_request_has_really_cost_counts_in_the_end(cost: float | None, is_next: list[bool]) -> None:
    door, _ = admission(max_open=3)
    running = [offer(door, "a", 1, 100) for _ in range(2)]
    offer(door, "b", 1, 100)
    waiting = [offer(door, tenant, 1, 100) for tenant in "ab"]
    door.release(running[0], cost)
    assert [ticket.state is TicketState.ADMITTED for ticket in waiting] == is_next


def test_the_more_urgent_enter_first_and_a_level_is_made_up_for_by_waiting() -> None:
    door, clock = admission(max_open=1)
    running = offer(door, "t", 1, 10)
    late, soon, urgent = (offer(door, "t", 1, 10, priority=priority) for priority in (1, 0, -1))
    door.release(running)
    assert states(late, soon, urgent) == ["waiting", "waiting", "admitted"]
    more = offer(door, "t", 1, 10)
    clock.now_s += 10.1
    door.release(urgent)
    assert states(late, soon, more) == ["waiting", "admitted", "waiting"]
    clock.now_s += 0.1
    door.release(soon)
    assert states(late, more) == ["admitted", "waiting"]


def test_a_flood_is_refused_for_its_own_tenant_only() -> None:
    door, _ = admission(max_open=4, max_queued=10)
    flood = [offer(door, "flood", 1, 100) for _ in range(14)]
    with pytest.raises(OverloadedError, match="10 requests wait already"):
        offer(door, "flood", 1, 100)
    calm = [offer(door, "calm", 1, 100) for _ in range(7)]
    assert states(*calm) == ["admitted"] * 2 + ["waiting"] * 5
    with pytest.raises(OverloadedError, match="15 requests wait already; at most 10.*its part beside 1 others"):
        offer(door, "calm", 1, 100)
    door.release(flood[0])
    assert door.num_open == 5 and states(*calm[2:]) == ["waiting"] * 5


def test_tokens_are_bounded_for_each_tenant() -> None:
    door, _ = admission(max_open=100, max_tokens=1000)
    offer(door, "flood", 1, 1000)
    with pytest.raises(OverloadedError, match="hold 1000 tokens, and this one 10"):
        offer(door, "flood", 1, 10)
    offer(door, "calm", 1, 500)
    with pytest.raises(OverloadedError):
        offer(door, "calm", 1, 10)


def test_a_newcomer_does_not_wait_behind_a_backlog() -> None:
    door, _ = admission(max_open=1)
    offer(door, "greedy", 1, 100)
    backlog = [offer(door, "greedy", 1, 100) for _ in range(5)]
    newcomer = offer(door, "new", 1, 100)
    assert newcomer.state is TicketState.ADMITTED and set(states(*backlog)) == {"waiting"}


def test_retry_after_is_the_time_to_drain_what_waits() -> None:
    door, clock = admission(max_open=1, max_queued=2)
    tickets = [offer(door, "t", 1, 100)]
    for _ in range(4):                          # 100 tokens every 5 s
        clock.now_s += 5
        door.release(tickets.pop())
        tickets.append(offer(door, "t", 1, 100))
    offer(door, "t", 1, 50)
    offer(door, "t", 1, 90)
    with pytest.raises(OverloadedError) as refusal:
        offer(door, "t", 1, 1)
    assert refusal.value.retry_after_s == pytest.approx(140 / 20)


def test_retry_after_is_of_the_tenants_own_backlog() -> None:
    door, clock = admission(max_open=1, max_queued=12)
    tickets = [offer(door, "flood", 1, 100)]
    for _ in range(4):                          # 100 tokens every 5 s
        clock.now_s += 5
        door.release(tickets.pop())
        tickets.append(offer(door, "flood", 1, 100))
    waiting = [offer(door, "flood", 1, 100) for _ in range(12)]
    calm = [offer(door, "calm", 1, 10) for _ in range(7)]       # the first enters, six are its part of the queue
    assert calm[0].state is TicketState.ADMITTED and door.num_queued == len(waiting) + 6
    after_s = {}
    for tenant in ("flood", "calm"):
        with pytest.raises(OverloadedError) as refusal:
            offer(door, tenant, 1, 10)
        after_s[tenant] = refusal.value.retry_after_s
    assert after_s == {"flood": 60.0, "calm": pytest.approx(6 * 10 * 2 / 20)}      # of a half of 20 tokens a second


@settings(max_examples=20)
@given(weights=st.tuples(st.integers(1, 5), st.integers(1, 5)), num_parts=st.integers(1, 3))
def test_what_enters_while_all_wait_follows_the_weights(weights: tuple[int, int], num_parts: int) -> None:
    """Requests are alike and end in the order in which they have entered."""
    num_rounds, max_open = 20, num_parts * sum(weights)
    door, _ = admission(max_open=max_open, max_queued=10_000)
    waiting = {tenant: deque(offer(door, str(tenant), 1, 10, weight=weight) for _ in range(num_rounds * max_open))
               for tenant, weight in enumerate(weights)}
    entered: deque[Ticket] = deque()
    num_ended = [0, 0]
    for _ in range(num_rounds * max_open):
        for tickets in waiting.values():
            while tickets and tickets[0].state is TicketState.ADMITTED:
                entered.append(tickets.popleft())
        ticket = entered.popleft()
        door.release(ticket)
        num_ended[int(ticket.tenant)] += 1
    by_weight = [num / weight for num, weight in zip(num_ended, weights, strict=True)]
    assert abs(by_weight[0] - by_weight[1]) <= 2 * max_open / min(weights) + 2      # before both waited


def test_the_flood_of_a_heavy_tenant_does_not_keep_a_light_one_out() -> None:
    door, _ = admission(max_open=10)
    bound = door._config.max_queued_tokens
    offer(door, "heavy", 1, bound, weight=100)
    light = offer(door, "light", 1, bound // 10)            # more than its part
    assert light.state is TicketState.ADMITTED
    with pytest.raises(OverloadedError, match="a tenant has its part"):
        offer(door, "light", 1, bound // 10)


async def test_a_deadline_ends_the_wait() -> None:
    door, clock = admission(max_open=1)
    open_ticket = await enter(door, 5.0)
    with pytest.raises(DeadlineExceededError):
        await enter(door, clock.now_s)
    assert (door.num_open, door.num_queued) == (1, 0)
    door.release(open_ticket)
    assert door.num_open == 0


async def queue_that_drains(door: Admission, clock: Clock, num_waiting: int) -> None:
    """Let so many of 10 tokens wait behind one, where one ends each second."""
    running = [offer(door, "t", 1, 10) for _ in range(num_waiting + 18)]
    for ticket in running[:17]:
        clock.now_s += 1.0
        door.release(ticket)
    assert door.num_queued == num_waiting


async def test_who_would_enter_after_the_deadline_is_refused_at_once() -> None:
    door, clock = admission(max_open=1)
    await queue_that_drains(door, clock, num_waiting=30)
    with pytest.raises(OverloadedError, match="would wait 30 s for admission, and its deadline is in 20 s") as refusal:
        await enter(door, clock.now_s + 20.0)
    assert refusal.value.retry_after_s == 10.0 and door.num_queued == 30


async def test_of_a_tenant_that_is_new_only_those_count_who_enter_before_it() -> None:
    door, clock = admission(max_open=1)
    await queue_that_drains(door, clock, num_waiting=30)
    offer(door, "new", 1, 10)           # its part
    other = asyncio.create_task(door.enter(Ticket("new", 1, 10, 10.0), clock.now_s + 20.0))
    await asyncio.sleep(0)
    assert not other.done() and door.num_queued == 31
    other.cancel()


async def test_after_a_pause_nobody_is_refused_by_how_slowly_others_came() -> None:
    door, clock = admission(max_open=1)
    for _ in range(40):
        clock.now_s += 100.0
        door.release(offer(door, "t", 1, 10))
    offer(door, "t", 1, 10)
    waiting = [offer(door, "t", 1, 10) for _ in range(20)]
    late = asyncio.create_task(enter(door, clock.now_s + 5.0))
    await asyncio.sleep(0)
    assert not late.done() and len(waiting) == 20
    late.cancel()


async def test_cancelling_a_waiting_request_removes_it() -> None:
    door, _ = admission(max_open=1)
    first = await enter(door, 5.0)
    waiting = asyncio.create_task(enter(door, 5.0))
    await asyncio.sleep(0)
    assert door.num_queued == 1
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert door.num_queued == 0
    door.release(first)
    assert door.num_open == 0


async def test_admitted_and_cancelled_at_once_gives_the_place_back() -> None:
    door, _ = admission(max_open=1)
    first = await enter(door, 5.0)
    waiting = asyncio.create_task(enter(door, 5.0))
    await asyncio.sleep(0)
    door.release(first)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (door.num_open, door.num_queued) == (0, 0)


async def test_closing_turns_everybody_away() -> None:
    door, _ = admission(max_open=1)
    await enter(door, 5.0)
    waiting = asyncio.create_task(enter(door, 5.0))
    await asyncio.sleep(0)
    door.close()
    with pytest.raises(NotReadyError):
        await waiting
    with pytest.raises(NotReadyError):
        await enter(door, 5.0)


def test_later_parts_wait_where_others_are_refused_and_leave_them_half_of_the_tokens() -> None:
    door, _ = admission(max_open=10, max_queued=2, max_tokens=1000)
    first = offer(door, "t", 1, 400)
    second, third = (offer(door, "t", 1, 100, is_later_part=True) for _ in range(2))
    assert states(first, second, third) == ["admitted", "admitted", "waiting"]
    other = offer(door, "u", 1, 300)
    assert states(third, other) == ["waiting", "admitted"]
    huge = offer(door, "t", 1, 5000, is_later_part=True)
    for ticket in (first, second, other):
        door.release(ticket)
    assert states(third, huge) == ["admitted", "waiting"]
    door.release(third)
    assert states(huge) == ["admitted"]         # alone, as any request


operations = st.lists(st.tuples(st.sampled_from(["offer", "later", "release"]), st.sampled_from("abc"),
                                st.integers(1, 3), st.integers(1, 60), st.integers(0, 99)), max_size=60)


@given(operations=operations)
def test_every_accepted_request_waits_or_ends_exactly_once(operations: list[tuple[str, str, int, int, int]]) -> None:
    door, clock = admission(max_open=3, max_queued=5, max_tokens=200)
    live: list[Ticket] = []

    def check() -> None:
        waiting = [ticket for ticket in live if ticket.state is TicketState.WAITING]
        admitted = [ticket for ticket in live if ticket.state is TicketState.ADMITTED]
        assert len(waiting) + len(admitted) == len(live), "a live ticket never ends by itself"
        assert door.num_open == sum(ticket.num_requests for ticket in admitted) <= 6
        assert door.num_queued == sum(ticket.num_requests for ticket in waiting)
        if not any(ticket.is_later_part for ticket in live):
            assert door.num_queued <= 10
            assert sum(ticket.num_tokens for ticket in live) <= 400 or len(live) == 1
            assert len({ticket.tenant for ticket in live}) != 1 or door.num_queued <= 5
        num_tokens = sum(ticket.num_tokens for ticket in admitted)
        if waiting:     # nobody waits for nothing
            assert any(door.num_open + ticket.num_requests > 3 or
                       (ticket.is_later_part and admitted and num_tokens + ticket.num_tokens > 100)
                       for ticket in waiting)

    for operation, tenant, num_requests, num_tokens, pick in operations:
        clock.now_s += 1
        if operation in ("offer", "later"):
            try:
                live.append(offer(door, tenant, num_requests, num_tokens, operation == "later"))
            except OverloadedError as error:
                assert 1.0 <= error.retry_after_s <= 60.0
        elif live:
            ticket = live.pop(pick % len(live))
            door.release(ticket)
            door.release(ticket)        # again: nothing
        check()
    while live:
        ready = [ticket for ticket in live if ticket.state is TicketState.ADMITTED]
        assert ready, "the queue has stopped moving"
        door.release(ready[0])
        live.remove(ready[0])
        check()
    assert (door.num_open, door.num_queued) == (0, 0)
