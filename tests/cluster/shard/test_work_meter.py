"""Measured over expected work, with steps and profiles of the test's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.planner.costs.measured_profile import RATIO_RANGE, corrected
from cluster.shard.work_meter import MIN_STEPS, WorkMeter
from model.step import SamplingSpec, ScheduledRequest, StepPlan, StepStats, StepWork
from serving.link.epoch import WorkRatio
from tests.cluster.planner.planned_members import model_args
from tests.cluster.profiles import PROFILE

HALF_LIFE_S = 10.0
ARGS = model_args(num_layers=3)
GREEDY = SamplingSpec(temperature=0.0)
DECODE = ScheduledRequest("d", (7,), 99, (), GREEDY)            # attends to 100 tokens
PREFILL = ScheduledRequest("p", (1,) * 63, 0, (), None)         # to 1 + 2 + ... + 63, and draws nothing
PLAN = StepPlan(1, 0, (DECODE, PREFILL))
ROWS = ((1, 0, 64), (0, 0, 1), (1, 1, 0))
# By PROFILE: 64 rows, one of which draws.
DENSE_S = 1e-4 + 63 / 255 * (2e-3 - 1e-4)
ATTENTION_S = DENSE_S + 4e-8 * (100 + 63 * 64 // 2)
OWN_P = (ATTENTION_S,) * 3 + (1e-3,)                                # seconds before each layer's experts, and after all
EXPERTS_L = (4e-5 + 3e-4, 4e-5, 2 * 4e-5)                           # seconds of each layer
PLANNING_L = (1e-5, 2e-5, 6e-5)


def meter() -> WorkMeter:
    return WorkMeter(PROFILE, ARGS, HALF_LIFE_S, now_s=100.0)


def stats(own: float = 1.0, experts: float = 1.0) -> StepStats:
    """A step that took so many times as long as the profile says."""
    return StepStats(expert_rows=ROWS, work=StepWork(times(own, OWN_P), PLANNING_L, times(experts, EXPERTS_L)))


def times(ratio: float, seconds: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(ratio * part_s for part_s in seconds)


def measured(own: float, experts: float) -> WorkRatio:
    one = meter()
    for _ in range(30):
        one.add(PLAN, stats(own, experts), 100.0)
    ratio = one.snapshot(100.0)
    assert ratio is not None
    return ratio


@pytest.mark.parametrize(("own", "experts"), [(1.0, 1.0), (1.5, 1.0), (1.0, 1.5), (0.5, 2.0)])
def test_parts_are_measured_apart(own: float, experts: float) -> None:
    ratio = measured(own, experts)
    assert (ratio.own, ratio.experts, ratio.num_steps) == (pytest.approx(own), pytest.approx(experts), 30)


def test_nothing_is_said_before_enough_was_measured() -> None:
    one = meter()
    for _ in range(int(MIN_STEPS) - 1):
        one.add(PLAN, stats(), 100.0)
    assert one.snapshot(100.0) is None
    one.add(PLAN, stats(), 100.0)
    assert one.snapshot(100.0) is not None
    assert one.snapshot(101.0) is None          # they count for less by now


def test_few_steps_are_enough_when_they_are_long() -> None:
    one = meter()
    one.add(PLAN, StepStats(expert_rows=ROWS, work=StepWork((2.5, *OWN_P[1:]), PLANNING_L, EXPERTS_L)), 100.0)
    ratio = one.snapshot(100.0)
    weight = OWN_P[0] / sum(OWN_P)
    assert ratio is not None and ratio.experts is None
    assert ratio.own == pytest.approx(1.0 - weight + RATIO_RANGE[1] * weight)      # not more than that counts


def test_a_part_without_rows_does_not_count() -> None:
    hosts, asks = meter(), meter()
    for _ in range(30):
        hosts.add(StepPlan(1, 0, ()), stats(), 100.0)
        asks.add(PLAN, replace(stats(), expert_rows=((), (0, 0), ())), 100.0)
    of_host, of_asker = hosts.snapshot(100.0), asks.snapshot(100.0)
    assert of_host is not None and of_host.own is None and of_host.experts == pytest.approx(1.0)
    assert of_asker is not None and of_asker.own == pytest.approx(1.0) and of_asker.experts is None


def test_steps_that_were_not_timed_do_not_count() -> None:
    one = meter()
    for _ in range(30):
        one.add(PLAN, StepStats(expert_rows=ROWS), 100.0)
    assert one.snapshot(100.0) is None


def test_older_steps_count_for_less() -> None:
    one = meter()
    for _ in range(60):
        one.add(PLAN, stats(own=4.0), 100.0)
    for _ in range(60):
        one.add(PLAN, stats(own=1.0), 100.0 + HALF_LIFE_S)
    ratio = one.snapshot(100.0 + HALF_LIFE_S)
    assert ratio is not None and ratio.own == pytest.approx((0.5 * 4.0 + 1.0) / 1.5)
    for days in range(1, 4):
        assert one.snapshot(100.0 + days * 86400.0) is None


def test_long_steps_weigh_more() -> None:
    one = meter()
    big = ((64, 64, 64),) * 3
    big_s = 3 * 3e-4
    for _ in range(20):
        one.add(PLAN, stats(experts=2.0), 100.0)
        one.add(PLAN, StepStats(expert_rows=big, work=StepWork(OWN_P, PLANNING_L, (big_s,) * 3)), 100.0)
    ratio = one.snapshot(100.0)
    assert ratio is not None and ratio.experts == pytest.approx(
        (2 * sum(EXPERTS_L) + 3 * big_s) / (sum(EXPERTS_L) + 3 * big_s))


def test_dense_layers_and_a_sliding_window_are_expected_too() -> None:
    args = replace(model_args(num_layers=3, dense=(0,)), sliding_window=10)
    one = WorkMeter(PROFILE, args, HALF_LIFE_S, 100.0)
    mlp_s = 1024 / 512 * 3e-4
    attention_s = DENSE_S + 4e-8 * (10 + 55 + 53 * 10)
    expected_s = (2 * attention_s + mlp_s, attention_s, 1e-3)
    for _ in range(30):
        one.add(PLAN, StepStats(expert_rows=ROWS[:2], work=StepWork(expected_s, PLANNING_L[:2], (1.0, 1.0))), 100.0)
    ratio = one.snapshot(100.0)
    assert ratio is not None and (ratio.own, ratio.own_spread) == (pytest.approx(1.0), pytest.approx(0.0))


def test_by_the_corrected_profile_the_steps_took_what_is_expected() -> None:
    slow = corrected(PROFILE, measured(1.4, 1.9), 8)
    again = WorkMeter(slow, ARGS, HALF_LIFE_S, 100.0)
    for _ in range(30):
        again.add(PLAN, stats(1.4, 1.9), 100.0)
    ratio = again.snapshot(100.0)
    assert ratio is not None and (ratio.own, ratio.experts) == (pytest.approx(1.0), pytest.approx(1.0))


def test_work_that_varies_has_a_spread() -> None:
    one, draw = meter(), np.random.default_rng(0)
    own_P, of_layers_L = draw.normal(1.0, 0.1, (400, 4)), draw.normal(1.5, (0.2, 0.0, 0.1), (400, 3))
    for own, of_layers in zip(own_P * OWN_P, of_layers_L * EXPERTS_L, strict=True):
        one.add(PLAN, StepStats(expert_rows=ROWS, work=StepWork(tuple(own), PLANNING_L, tuple(of_layers))), 100.0)
    ratio, weights_L = one.snapshot(100.0), np.array(EXPERTS_L) / sum(EXPERTS_L)
    assert ratio is not None and ratio.own_spread == pytest.approx(0.1, rel=0.15)
    assert ratio.experts_spread == pytest.approx(weights_L @ (0.2, 0.0, 0.1), rel=0.15)


def test_what_drifts_or_differs_between_kinds_of_steps_is_no_spread() -> None:
    one, decode = meter(), StepPlan(1, 0, (DECODE,))
    for slowness in np.linspace(1.0, 2.0, 100):
        one.add(PLAN, stats(own=slowness, experts=slowness), 100.0)
        work = StepWork((1e-4,) * 4, PLANNING_L, (9e-5, 0.0, 0.0))
        one.add(decode, StepStats(expert_rows=((1,), (0,), (0,)), work=work), 100.0)
    ratio = one.snapshot(100.0)
    assert ratio is not None and (ratio.own_spread, ratio.experts_spread) == (0.0, 0.0)
    for slowness in np.linspace(2.0, 1.0, 100):
        one.add(PLAN, stats(own=slowness, experts=slowness), 100.0)
    ratio = one.snapshot(100.0)
    assert ratio is not None and max(ratio.own_spread, ratio.experts_spread) < 0.02


def test_one_step_out_of_range_counts_as_the_limit() -> None:
    one = meter()
    for own in (1.0,) * 39 + (1e6,):
        one.add(PLAN, stats(own=own), 100.0)
    ratio = one.snapshot(100.0)
    assert ratio is not None and ratio.own == pytest.approx((39 + RATIO_RANGE[1]) / 40)
