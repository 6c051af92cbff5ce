"""What waits is served by priority, then by tenant, then by arrival, and nobody waits for ever."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.fair_queue import FairQueue
from serving.priority import AGEING_S


@dataclass(eq=False)
class Ask:
    arrival_index: int
    tenant: str = "t"
    priority: int = 0
    weight: int = 1


def first(queue: FairQueue[Ask], now_s: float = 0.0) -> Ask:
    return next(iter(queue.queues(now_s)))[0]


def serve(queue: FairQueue[Ask], now_s: float = 0.0, cost: float = 10.0) -> Ask:
    ask = first(queue, now_s)
    queue.remove(ask)
    queue.charge(ask, cost)
    queue.served(ask.priority, now_s)
    return ask


def filled(*asks: Ask) -> FairQueue[Ask]:
    queue: FairQueue[Ask] = FairQueue()
    for ask in asks:
        queue.add(ask, 0.0)
    return queue


def test_one_tenant_is_served_as_it_came_and_who_comes_back_has_its_old_place() -> None:
    asks = [Ask(index) for index in range(5)]
    queue = filled(*asks[1:])
    queue.add(asks[0], 0.0)
    assert [serve(queue).arrival_index for _ in range(5)] == [0, 1, 2, 3, 4] and len(queue) == 0 and not list(queue)


def test_the_more_urgent_go_first_and_their_tenants_take_turns() -> None:
    queue = filled(*(Ask(index, "flood", 1) for index in range(3)), *(Ask(3 + index, "flood") for index in range(3)),
                   Ask(6, "other"), Ask(7, "third", -1))
    assert [serve(queue).arrival_index for _ in range(8)] == [7, 3, 6, 4, 5, 0, 1, 2]


def test_a_priority_that_is_not_served_ages_and_its_backlog_gains_one_turn() -> None:
    queue = filled(*(Ask(index, "batch", 2) for index in range(2)), *(Ask(2 + index, "chat") for index in range(20)))
    step_s, order = AGEING_S / 2, []
    for step in range(14):
        order.append(serve(queue, step * step_s).tenant)
    assert [index for index, tenant in enumerate(order) if tenant == "batch"] == [6, 12]


def test_those_that_run_are_ranked_among_those_that_wait() -> None:
    queue = filled(Ask(5, "busy"), Ask(6, "idle"))
    queue.charge(Ask(0, "busy"), 100.0)
    begun = Ask(1, "busy")
    assert queue.rank(first(queue), 0.0) < queue.rank(begun, 0.0) < queue.rank(Ask(0, "idle", 1), 0.0)


asks = st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 3)), min_size=1, max_size=8)


@settings(max_examples=40)
@given(waiting=asks, late=asks)
def test_whoever_waits_is_served_in_a_bounded_time_however_urgent_others_are(
        waiting: list[tuple[str, int]], late: list[tuple[str, int]]) -> None:
    """One is served each second, and one of the late ones comes each second, for as long as it takes."""
    queue = filled(*(Ask(index, tenant, priority) for index, (tenant, priority) in enumerate(waiting)))
    left, now_s = set(range(len(waiting))), 0.0
    bound_s = (3 * len(waiting) + 6) * (5 * AGEING_S + 6)      # turns of a priority, of three tenants
    while left:
        tenant, priority = late[int(now_s) % len(late)]
        queue.add(Ask(len(waiting) + int(now_s), tenant, priority), now_s)
        left.discard(serve(queue, now_s).arrival_index)
        now_s += 1.0
        assert now_s <= bound_s
