"""Counts a member's work, and emulates a speed: the member then waits as long as a slower device would still compute.

Work is what happens between the end of one collective and the start of the next, from the start of a step to its first
collective, and from its last one to its end. The agreement between steps is not work, nor is a collective itself. It
is done for the member's own rows or, between `begin_experts` and `end_experts`, for experts, whoever owns their rows:
up to `end_planning` to know whose rows go where, then to bring them to the experts and to compute them.
Members that emulate on one machine may take turns, so that they do not compete for its memory and caches: what a member
waits for its turn is part of what it would wait anyway, as long as their speeds add up to well below 1.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from model.step import StepWork

_CREDIT_LASTS_S = 0.1       # longer gaps are idle time, or a wait for others that makes up for any oversleep


class Turns(Protocol):
    """Says who may compute. A turn that was taken is given back before the member waits for anybody."""

    def take(self) -> None: ...
    def give(self) -> None: ...


class FileTurns:
    """Takes turns with the processes that lock the same file; one that dies gives its turn back.

    The kernel wakes who waits at once; the library filelock would look every few milliseconds.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def take(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def give(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)


class Pace(Protocol):
    """Is told by a runner and its dispatcher where work begins and ends. All methods are called on their thread."""

    is_passing_time: bool       # work is time that passes, and nobody is made to wait

    def begin_step(self) -> None:
        """Begin a step, whatever has become of the one before."""

    def begin(self) -> None:
        """Begin to work: a step begins, or a collective has ended."""

    def begin_experts(self) -> None:
        """Begin to work for the experts of a layer, with the planning of its rows."""

    def end_planning(self) -> None:
        """End the planning of a layer's rows."""

    def end_experts(self) -> None:
        """End the work for the experts of a layer."""

    def settle(self) -> None:
        """End to work: a collective comes, or the step is over."""

    def exchanged(self, sent_s: float, arrived_s: float, planned_s: float, left_s: float, returned_s: float) -> None:
        """Count a layer with experts that C computed: when its rows were sent and had arrived, were planned, when
        outputs left and had returned, by time.perf_counter. Only where `is_passing_time`."""

    def end_step(self) -> StepWork | None:
        """End the step and its work. Return the seconds of work; None where they are not timed."""


class UntimedPace:
    """See Pace. Times nothing, and the member goes as fast as it can."""

    is_passing_time = True

    def begin_step(self) -> None: ...
    def begin(self) -> None: ...
    def begin_experts(self) -> None: ...
    def end_planning(self) -> None: ...
    def end_experts(self) -> None: ...
    def settle(self) -> None: ...
    def exchanged(self, sent_s: float, arrived_s: float, planned_s: float, left_s: float,
                  returned_s: float) -> None: ...
    def end_step(self) -> None: ...


UNTIMED = UntimedPace()


class TimedPace:
    """See Pace.

    `work_clock` counts seconds of work (see work_clock_of); `clock` those that pass. Without `turns` it never waits to
    compute.
    """

    def __init__(self, speed: float, work_clock: Callable[[], float], clock: Callable[[], float] = time.perf_counter,
                 sleep: Callable[[float], None] = time.sleep, turns: Turns | None = None) -> None:
        if not 0.0 < speed <= 1.0:
            raise ValueError(f"emulated speed {speed} is not within (0, 1]: nobody computes faster than the device")
        self.speed = speed
        self.is_passing_time = speed == 1.0 and turns is None and work_clock is time.perf_counter
        self.work_s = 0.0           # since construction, as the device computed it
        self._forget_step()
        self._work_clock = work_clock
        self._clock = clock
        self._sleep = sleep
        self._turns = turns
        self._credit_s = 0.0        # slept too long before: the next sleep is shorter by it
        self._settled_s = -_CREDIT_LASTS_S
        self._begin_s = 0.0
        self._begin_work_s = 0.0
        self._counted_work_s = 0.0

    def _forget_step(self) -> None:
        # Of this step: for own rows, before, between and after the layers with experts; for each of these, to plan
        # whose rows go where, and then for its experts.
        self.own_work_s: list[float] = [0.0]
        self.planning_work_s: list[float] = []
        self.experts_work_s: list[float] = []
        self._part_s = self.own_work_s          # whose last number is counted on

    def begin_step(self) -> None:
        self._forget_step()
        self.begin()

    def begin(self) -> None:
        self._begin_s = self._clock()
        if self._begin_s - self._settled_s >= _CREDIT_LASTS_S:
            self._credit_s = 0.0
        if self._turns is not None:
            self._turns.take()
        self._begin_work_s = self._counted_work_s = self._work_clock()

    def begin_experts(self) -> None:
        self._begin_part(self.planning_work_s)

    def end_planning(self) -> None:
        self._begin_part(self.experts_work_s)

    def end_experts(self) -> None:
        self._begin_part(self.own_work_s)

    def exchanged(self, sent_s: float, arrived_s: float, planned_s: float, left_s: float, returned_s: float) -> None:
        assert self.is_passing_time
        self._count(sent_s)
        self._counted_work_s = arrived_s
        self._begin_part(self.planning_work_s, arrived_s)
        self._begin_part(self.experts_work_s, planned_s)
        self._count(left_s)
        self._begin_s = self._begin_work_s = self._counted_work_s = returned_s
        self._begin_part(self.own_work_s, returned_s)

    def _begin_part(self, part_s: list[float], now_s: float | None = None) -> None:
        self._count(now_s)
        part_s.append(0.0)
        self._part_s = part_s

    def settle(self) -> None:
        """Sleep until begin + work / speed."""
        self._count()
        work_s = self._counted_work_s - self._begin_work_s
        if self._turns is not None:
            self._turns.give()
        due_s = self._begin_s + work_s / self.speed
        now_s = self._clock()
        wake_s = due_s - self._credit_s
        if wake_s > now_s:
            self._sleep(wake_s - now_s)
            self._settled_s = self._clock()
            self._credit_s = self._settled_s - wake_s
        else:
            self._credit_s -= max(0.0, due_s - now_s)
            self._settled_s = now_s

    def end_step(self) -> StepWork:
        self.settle()
        own_s, planning_s, experts_s = (tuple(work_s / self.speed for work_s in part_s) for part_s in (
            self.own_work_s, self.planning_work_s, self.experts_work_s))
        return StepWork(own_s, planning_s, experts_s)

    def _count(self, now_s: float | None = None) -> None:
        if now_s is None:
            now_s = self._work_clock()
        work_s, self._counted_work_s = now_s - self._counted_work_s, now_s
        self.work_s += work_s
        self._part_s[-1] += work_s


def work_clock_of(device: torch.device, num_threads: int) -> Callable[[], float]:
    """Return the clock that an emulated speed and the device's profile go by.

    One CPU thread: its CPU time, whatever else the machine does. Several threads: time that passes, which is also that
    of other programs. An accelerator: time that passes until it has done what it was given.
    """
    if device.type != "cpu":
        return lambda: _time_when_done(device)
    return time.thread_time if num_threads == 1 else time.perf_counter


def _time_when_done(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return time.perf_counter()
