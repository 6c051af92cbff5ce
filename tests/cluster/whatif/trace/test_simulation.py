"""Every request of a trace is served once, in the times that the fleet takes, and replicas are paid while wanted."""

from __future__ import annotations

import math

import pytest

from cluster.autoscaler.fleet import Counts, Work
from cluster.whatif.trace.scalers import FixedSize
from cluster.whatif.trace.simulation import DECIDE_S, LEAVE_S, Run, Simulation
from cluster.whatif.trace.trace_file import TracedRequest
from tests.cluster.whatif.trace.simulated import burst, model


class Schedule:
    """Wants what it was told from a time on."""

    def __init__(self, counts: dict[float, int]) -> None:
        self.counts = counts
        self.works: list[Work] = []

    def wanted(self, now_s: float, wanted: Counts, ready: Counts, work: Work) -> Counts:
        self.works.append(work)
        return (next(count for at_s, count in reversed(self.counts.items()) if at_s <= now_s),)


def fixed(requests: list[TracedRequest], num: int = 2) -> Run:
    return Simulation(requests, model(), FixedSize((num,)), (num,)).run()


def test_one_request_takes_its_steps() -> None:
    run, fleet = fixed([TracedRequest(0.0, 100, 11)]), model()
    served = run.served[0]
    assert served.ttft_s == pytest.approx(fleet.step_s((2,), 100))
    assert served.itl_s == pytest.approx(fleet.step_s((2,), 1))
    assert run.replica_seconds == pytest.approx(2 * (served.end_s or 0)) and run.cost > 0


def test_no_step_takes_longer_than_a_token_may() -> None:
    run = fixed([TracedRequest(0.0, 20, 400), *burst(5, 1.0, prompt=2000)])
    assert run.served[0].itl_s < model().rules.itl_slo_s
    assert run.attained(math.inf, model().rules.itl_slo_s) == 1.0


def test_more_replicas_serve_a_burst_sooner() -> None:
    few, many = fixed(burst(20, 0.0), 2), fixed(burst(20, 0.0), 6)
    assert max(one.ttft_s for one in many.served) < 0.5 * max(one.ttft_s for one in few.served)
    assert all(one.end_s is not None for one in (*few.served, *many.served))


def test_replicas_that_are_wanted_come_after_their_start_and_are_paid_from_the_wish_on() -> None:
    schedule = Schedule({0.0: 0, 3.0: 2, 20.0: 0})
    run = Simulation([TracedRequest(1.0, 10, 2), TracedRequest(30.0, 10, 2)], model(), schedule, (0,))
    ran = run.run()
    assert ran.served[0].first_s == pytest.approx(5.0, abs=DECIDE_S + 0.1)
    assert ran.served[1].first_s is None and math.isinf(ran.served[1].ttft_s) and math.isinf(ran.served[1].itl_s)
    assert ran.replica_seconds == pytest.approx(2 * (17.0 + LEAVE_S), abs=2 * DECIDE_S)
    assert ran.attained(10.0, 1.0) == 0.5


def test_the_work_that_is_shown_adds_up() -> None:
    schedule = Schedule({0.0: 2})
    Simulation([*burst(4, 1.0), TracedRequest(9.0, 50, 3), TracedRequest(12.0, 1, 1)], model(), schedule, (2,)).run()
    assert schedule.works[0] == Work()
    busiest = max(schedule.works, key=lambda work: work.num_waiting_tokens)
    assert busiest.num_held and busiest.num_kv_tokens >= busiest.num_waiting_tokens > 0
    last = schedule.works[-1]
    assert (last.num_held, last.num_kv_tokens, last.num_arrived, last.num_prompt_tokens) == (0, 0, 5, 4 * 400 + 50)
    assert 0 < last.num_output_tokens <= 5 * 5          # as long as those that had ended before
