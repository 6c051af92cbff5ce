"""The worker processes of the pace tests do these jobs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

from model.dispatch.auto import AutoDispatcher
from model.dispatch.dispatcher import Dispatcher
from model.dispatch.exchange import RowExchange
from model.kernels.torch_kernels import TorchKernels
from model.pace import UNTIMED, TimedPace
from model.placement import Placement
from tests.process_pool import Worker

HIDDEN, NUM_STEPS = 32, 3
BEFORE_S, EXPERTS_S, AFTER_S = 1.0, 10.0, 100.0     # of a layer, by the clock of run_marked_steps


@dataclass(frozen=True)
class Paced:
    """Holds what one member did. Its clock is its CPU time and the sleeps, which are counted instead of slept."""

    num_collectives: int
    num_waits: int
    worked_s: float
    slept_s: float


def run_steps(worker: Worker, placement: Placement, num_tokens: tuple[int, ...], speeds: tuple[float | None, ...],
              mode: Literal["all_to_all", "gather"]) -> Paced | None:
    """Some steps of layers with real work between the collectives -> None for a member that emulates nothing."""
    rank, group = worker.index, worker.kept["group"]
    waits: list[float] = []
    speed = speeds[rank]
    pace = UNTIMED if speed is None else TimedPace(speed, time.thread_time, lambda: time.thread_time() + sum(waits),
                                                   waits.append)
    dispatcher = AutoDispatcher(RowExchange(TorchKernels("cpu"), placement, rank, group.rows, pace), mode)
    for _ in range(NUM_STEPS):
        pace.begin_step()
        run_step(dispatcher, placement, num_tokens[rank], num_tokens)
        pace.end_step()
    if not isinstance(pace, TimedPace):
        return None
    return Paced(dispatcher.num_collectives, len(waits), pace.work_s, sum(waits))


def run_marked_steps(worker: Worker, placement: Placement, num_tokens: tuple[int, ...],
                     mode: Literal["all_to_all", "gather"]) -> tuple[float, list[float]]:
    """The same with a clock that only the test moves -> seconds of work, and the last step's for experts, by layer."""
    rank, group = worker.index, worker.kept["group"]
    clock = MovedClock()
    pace = TimedPace(1.0, clock, clock)
    dispatcher = AutoDispatcher(RowExchange(TorchKernels("cpu"), placement, rank, group.rows, pace), mode)
    for _ in range(NUM_STEPS):
        pace.begin_step()
        run_step(dispatcher, placement, num_tokens[rank], num_tokens, clock)
        pace.settle()
    return pace.work_s, pace.experts_work_s


class MovedClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def run_step(dispatcher: Dispatcher, placement: Placement, num_own: int, num_tokens: tuple[int, ...],
             clock: MovedClock | None = None) -> None:
    clock = clock or MovedClock()
    dispatcher.begin_step(num_tokens)
    for layer in range(placement.num_layers):
        x_TD = torch.ones(num_own, HIDDEN)
        expert_ids_TK = torch.tensor([[0, 1]] * num_own, dtype=torch.int64).view(num_own, 2)
        clock.now_s += BEFORE_S
        rows_RD, handle = dispatcher.dispatch(layer, x_TD, expert_ids_TK)
        for _ in range(20):
            rows_RD = rows_RD + 1.0
        clock.now_s += EXPERTS_S
        dispatcher.combine(layer, rows_RD, torch.ones(num_own, 2), handle)
        clock.now_s += AFTER_S
