"""Whoever was served least is next, and nobody is served much more than another that waits as long."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from serving.fair_queue import FairQueue
from serving.token_counters import CACHED_WEIGHT, MAX_CREDIT, OUTPUT_WEIGHT, PROMPT_WEIGHT, TokenCounters, token_cost


def test_tokens_cost_what_they_take() -> None:
    assert token_cost(10, 0, 0) == 10 * PROMPT_WEIGHT and token_cost(0, 0, 3) == 3 * OUTPUT_WEIGHT
    assert token_cost(10, 10, 0) == 10 * CACHED_WEIGHT < token_cost(10, 9, 0)


def test_who_was_away_has_saved_up_no_more_than_a_credit() -> None:
    counters: TokenCounters[str] = TokenCounters()
    counters.begin_waiting("busy")
    counters.charge("busy", 100.0)
    counters.begin_waiting("new")
    assert counters.of("new") == 100.0      # it has never been away
    counters.charge("new", 10.0)
    counters.end_waiting("new")
    counters.charge("new", 5.0)             # what runs still counts
    counters.charge("busy", MAX_CREDIT)
    counters.begin_waiting("new")
    assert counters.of("new") == 115.0
    counters.end_waiting("new")
    counters.charge("busy", MAX_CREDIT)
    counters.begin_waiting("new")
    assert counters.of("new") == counters.of("busy") - MAX_CREDIT
    counters.begin_waiting("newest")
    assert counters.of("newest") == counters.of("new")


def test_when_nobody_waits_a_tenant_begins_where_the_last_one_is() -> None:
    counters: TokenCounters[str] = TokenCounters()
    counters.begin_waiting("a")
    counters.end_waiting("a")
    counters.charge("a", 70.0)
    counters.begin_waiting("b")
    assert counters.of("b") == 70.0
    counters.charge("b", -20.0)
    assert counters.of("b") == 50.0


def test_tenants_that_come_and_go_cost_no_memory() -> None:
    counters: TokenCounters[int] = TokenCounters()
    for tenant in range(5000):
        counters.begin_waiting(tenant)
        counters.charge(tenant, 1.0 + tenant % 7)
        counters.end_waiting(tenant)
    assert len(counters) < 2000
    assert counters.of(0) == counters.of(4999)      # forgotten: it begins where the present is


@dataclass
class Ask:
    tenant: int
    arrival_index: int
    num_prompt: int
    num_output: int
    weight: int = 1
    priority: int = 0
    num_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_left = self.num_output

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + self.num_output


requests = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=6)


@given(kinds=st.lists(requests, min_size=2, max_size=4), room=st.integers(40, 120),
       weights=st.just([1] * 4) | st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_the_bound_of_vtc_holds_for_tenants_that_always_wait(kinds: list[list[tuple[int, int]]], room: int,
                                                             weights: list[int]) -> None:
    """A batch of `room` tokens, every tenant with a backlog of its own kinds of requests. `served` is by weight."""
    queue: FairQueue[Ask] = FairQueue()
    for round_index in range(30):
        for tenant, shapes in enumerate(kinds):
            queue.add(Ask(tenant, round_index * len(kinds) + tenant, *shapes[round_index % len(shapes)],
                          weights[tenant]), 0.0)
    waiting = {tenant: 30 for tenant in range(len(kinds))}
    served = dict.fromkeys(waiting, 0.0)
    running: list[Ask] = []
    longest = max(num_prompt for shapes in kinds for num_prompt, _ in shapes)
    bound = 2 * max(PROMPT_WEIGHT * longest, OUTPUT_WEIGHT * room)
    while all(waiting.values()):
        while all(waiting.values()):
            ask = next(iter(queue.queues(0.0)))[0]
            if sum(one.num_tokens for one in running) + ask.num_tokens > room:
                break
            queue.remove(ask)
            queue.charge(ask, token_cost(ask.num_prompt, 0, 0))
            served[ask.tenant] += token_cost(ask.num_prompt, 0, 0) / ask.weight
            waiting[ask.tenant] -= 1
            running.append(ask)
        for ask in running:
            queue.charge(ask, OUTPUT_WEIGHT)
            served[ask.tenant] += OUTPUT_WEIGHT / ask.weight
            ask.num_left -= 1
        running = [ask for ask in running if ask.num_left]
        if all(waiting.values()):
            assert max(served.values()) - min(served.values()) <= bound
