"""Emulated speed with clocks of the test's own: what is slept, exactly."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.args import read_model_args
from model.dispatch.dispatcher import LocalDispatcher
from model.kernels.torch_kernels import TorchKernels
from model.pace import TimedPace, work_clock_of
from model.placement import Placement
from model.runner import Runner
from model.step import SamplingSpec, ScheduledRequest, StepPlan
from model.weights import load_decoder
from tests.deadlines import PATIENCE_S
from tests.model.pace_jobs import AFTER_S, BEFORE_S, EXPERTS_S, NUM_STEPS, MovedClock, run_step
from tests.placements import contiguous_placement
from tests.process_pool import ProcessPool


class FakeDevice:
    """Time that passes and time that is worked; every sleep lasts `oversleep_s` too long."""

    def __init__(self, oversleep_s: float = 0.0) -> None:
        self.now_s = 100.0
        self.worked_s = 7.0
        self.slept_s: list[float] = []
        self.oversleep_s = oversleep_s

    def pace(self, speed: float) -> TimedPace:
        return TimedPace(speed, lambda: self.worked_s, lambda: self.now_s, self.sleep)

    def work(self, seconds: float, stolen_s: float = 0.0) -> None:
        """`stolen_s`: meanwhile others had the processor."""
        self.worked_s += seconds
        self.now_s += seconds + stolen_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept_s.append(seconds)
        self.now_s += seconds + self.oversleep_s


def test_a_quarter_of_the_speed_takes_four_times_as_long() -> None:
    device = FakeDevice()
    pace = device.pace(0.25)
    pace.begin()
    device.work(0.01)
    pace.settle()
    assert device.slept_s == [pytest.approx(0.03)]
    device.now_s += 0.5             # a collective
    pace.begin()
    device.work(0.002)
    pace.settle()
    assert device.slept_s[1] == pytest.approx(0.006)
    assert pace.work_s == pytest.approx(0.012)


def test_time_that_others_took_is_not_waited_for_again() -> None:
    device = FakeDevice()
    pace = device.pace(0.25)
    pace.begin()
    device.work(0.01, stolen_s=0.02)
    pace.settle()
    assert device.slept_s == [pytest.approx(0.01)]
    pace.begin()
    device.work(0.01, stolen_s=0.05)
    pace.settle()
    assert len(device.slept_s) == 1     # late already, and that is no credit
    pace.begin()
    device.work(0.01)
    pace.settle()
    assert device.slept_s[1] == pytest.approx(0.03)


def test_oversleep_is_made_up_so_that_the_mean_is_exact() -> None:
    device = FakeDevice(oversleep_s=0.0004)
    pace = device.pace(0.5)
    random.seed(1)
    began_s, work_s = device.now_s, 0.0
    for _ in range(1000):
        pace.begin()
        part_s = random.choice((0.00005, 0.0003, 0.002))    # some shorter than an oversleep
        device.work(part_s)
        work_s += part_s
        pace.settle()
    assert device.now_s - began_s == pytest.approx(work_s / 0.5, abs=0.0005)
    assert pace.work_s == pytest.approx(work_s)


def test_no_credit_outlasts_idle_time() -> None:
    device = FakeDevice(oversleep_s=0.005)
    pace = device.pace(0.5)
    pace.begin()
    device.work(0.01)
    pace.settle()
    device.now_s += 3.0             # the group slept
    pace.begin()
    device.work(0.01)
    pace.settle()
    assert device.slept_s == [pytest.approx(0.01), pytest.approx(0.01)]
    pace.begin()
    device.work(0.01)
    pace.settle()
    assert device.slept_s[2] == pytest.approx(0.005)


def test_full_speed_never_waits() -> None:
    device = FakeDevice()
    pace = device.pace(1.0)
    for _ in range(100):
        pace.begin()
        device.work(0.001, stolen_s=0.0001)
        pace.settle()
    assert device.slept_s == []


def test_work_is_counted_for_own_rows_and_for_experts_apart() -> None:
    device = FakeDevice()
    pace = device.pace(0.5)
    pace.begin_step()
    device.work(0.01)
    pace.begin_experts()
    device.work(0.001)
    pace.end_planning()
    device.work(0.002)
    pace.settle()
    device.now_s += 0.3             # a collective within the experts' part is nobody's work
    pace.begin()
    device.work(0.004)
    pace.end_experts()
    device.work(0.03)
    pace.settle()
    assert pace.experts_work_s == [pytest.approx(0.006)] and pace.work_s == pytest.approx(0.047)
    assert pace.planning_work_s == [pytest.approx(0.001)]
    assert pace.own_work_s == [pytest.approx(0.01), pytest.approx(0.03)]
    assert device.slept_s == [pytest.approx(0.013), pytest.approx(0.034)]


def test_a_step_that_failed_among_the_experts_leaves_the_next_one_alone() -> None:
    device = FakeDevice()
    pace = device.pace(1.0)
    pace.begin_step()
    pace.begin_experts()
    device.work(0.01)
    pace.settle()                   # the collective that comes now fails
    device.work(7.0)                # handling that is no work
    pace.begin_step()
    device.work(0.002)
    pace.begin_experts()
    pace.end_planning()
    device.work(0.004)
    pace.end_experts()
    pace.settle()
    assert pace.work_s == pytest.approx(0.016) and pace.experts_work_s == [pytest.approx(0.004)]
    assert pace.own_work_s == [pytest.approx(0.002), pytest.approx(0.0)]


@pytest.mark.parametrize("speed", [0.0, -1.0, 1.5, float("nan")])
def test_a_speed_that_is_none_is_refused(speed: float) -> None:
    with pytest.raises(ValueError, match=f"emulated speed {speed}"):
        FakeDevice().pace(speed)


def test_work_is_cpu_time_of_one_thread_and_passing_time_of_several() -> None:
    assert work_clock_of(torch.device("cpu"), 1) is time.thread_time
    assert work_clock_of(torch.device("cpu"), 2) is time.perf_counter


def test_a_runner_takes_its_work_divided_by_the_speed(write_tiny: Callable[..., Path]) -> None:
    """Real steps. The clock is the thread's CPU time and the sleeps, so that what else runs here does not matter."""
    folder, kernels = write_tiny(), TorchKernels("cpu")
    args = read_model_args(folder)
    placement = contiguous_placement(args.num_moe_layers, args.num_experts, (args.num_experts,))
    decoder, _ = load_decoder(folder, args, torch.float32, kernels, placement, 0)
    slept_s: list[float] = []
    pace = TimedPace(0.25, time.thread_time, lambda: time.thread_time() + sum(slept_s), slept_s.append)
    runner = Runner(decoder, LocalDispatcher(kernels, placement, pace), 64, 4, pace)
    requests = (ScheduledRequest("r", tuple(range(1, 11)), 0, (4, 1, 7, 2), SamplingSpec(temperature=0.0)),)
    works = [runner.execute(StepPlan(1, step_index, requests), (10,)).stats.work for step_index in range(3)]
    assert len(slept_s) == 3 and pace.work_s > 0
    assert sum(slept_s) == pytest.approx(pace.work_s / 0.25 - pace.work_s, rel=0.2)
    assert all(work is not None and min(work.own_s) > 0 and len(work.own_s) == args.num_moe_layers + 1
               for work in works)
    assert all(work is not None and len(work.experts_s) == args.num_moe_layers for work in works)
    all_s = sum(sum(work.own_s) + sum(work.planning_s) + sum(work.experts_s) for work in works if work)
    assert all_s == pytest.approx(pace.work_s / 0.25)


def test_a_member_alone_works_for_experts_between_dispatch_and_combine() -> None:
    placement, clock = contiguous_placement(3, 2, (2,)), MovedClock()
    pace = TimedPace(1.0, clock, clock)
    dispatcher = LocalDispatcher(TorchKernels("cpu"), placement, pace)
    pace.begin_step()
    run_step(dispatcher, placement, 5, (5,), clock)
    pace.settle()
    assert (pace.experts_work_s, pace.work_s) == ([EXPERTS_S] * 3, 3 * (BEFORE_S + EXPERTS_S + AFTER_S))


@pytest.mark.multinode
@pytest.mark.parametrize("mode", ["all_to_all", "gather"])
@pytest.mark.parametrize("holders", [((0,), (1,)), ((0, 1), (0, 1))])       # rows travel; rows stay
def test_members_work_for_experts_between_dispatch_and_combine(
        worker_pool: ProcessPool, mode: str, holders: tuple[tuple[int, ...], ...]) -> None:
    worker_pool.run("tests.cluster.shard.group_jobs:join", [(worker_pool.meeting(2), PATIENCE_S)] * 2)
    placement = Placement(2, (holders,) * 4)
    counted = worker_pool.run("tests.model.pace_jobs:run_marked_steps", [(placement, (40, 1), mode)] * 2)
    worker_pool.run("tests.cluster.shard.group_jobs:leave", [()] * 2)
    layers = 4 * NUM_STEPS
    assert counted == [(layers * (BEFORE_S + EXPERTS_S + AFTER_S), [EXPERTS_S] * 4)] * 2


@pytest.mark.multinode
@pytest.mark.parametrize("mode", ["all_to_all", "gather"])
def test_members_wait_at_every_collective_also_without_rows_of_their_own(worker_pool: ProcessPool, mode: str) -> None:
    """Member 1 holds experts and has no rows; member 2 has rows and no experts."""
    worker_pool.run("tests.cluster.shard.group_jobs:join", [(worker_pool.meeting(3), PATIENCE_S)] * 3)
    placement = Placement(3, (((0,), (1,)),) * 4)
    speeds = (None, 0.25, 0.5)
    first, *slow = worker_pool.run("tests.model.pace_jobs:run_steps", [(placement, (40, 0, 40), speeds, mode)] * 3)
    worker_pool.run("tests.cluster.shard.group_jobs:leave", [()] * 3)
    assert first is None
    for paced, speed in zip(slow, speeds[1:], strict=True):
        assert paced.num_collectives > 0
        assert paced.num_waits == paced.num_collectives + NUM_STEPS
        assert paced.worked_s > 0
        assert paced.slept_s == pytest.approx(paced.worked_s / speed - paced.worked_s, rel=0.2)
