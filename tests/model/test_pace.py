"""Emulated speed with clocks of the test's own: what is slept, exactly."""

from __future__ import annotations

import random
import time

import pytest
import torch

from model.pace import Pace, work_clock_of


class FakeDevice:
    """Time that passes and time that is worked; every sleep lasts `oversleep_s` too long."""

    def __init__(self, oversleep_s: float = 0.0) -> None:
        self.now_s = 100.0
        self.worked_s = 7.0
        self.slept_s: list[float] = []
        self.oversleep_s = oversleep_s

    def pace(self, speed: float) -> Pace:
        return Pace(speed, lambda: self.worked_s, lambda: self.now_s, self.sleep)

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


@pytest.mark.parametrize("speed", [0.0, -1.0, 1.5, float("nan")])
def test_a_speed_that_is_none_is_refused(speed: float) -> None:
    with pytest.raises(ValueError, match=f"emulated speed {speed}"):
        FakeDevice().pace(speed)


def test_work_is_cpu_time_of_one_thread_and_passing_time_of_several() -> None:
    assert work_clock_of(torch.device("cpu"), 1) is time.thread_time
    assert work_clock_of(torch.device("cpu"), 2) is time.perf_counter
