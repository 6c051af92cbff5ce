"""Times what a member computes in a step, in the model's real shapes, with the kernels and classes that run them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from model.args import ModelArgs
from model.curve import Curve
from model.kernels.protocol import Kernels
from model.pace import work_clock_of
from model.probe_work import MAX_ROWS, NUM_SEQUENCES, ExpertGroups, Layers

ROWS = (1, 4, 16, 64, MAX_ROWS)
OTHERS_ROWS = MAX_ROWS
WAKING = ("layers", "layers for others")     # points whose thread sleeps in between: how it wakes up varies
Timings = dict[tuple[str, int], float]      # (what, rows) -> seconds of the fastest call

_POINT_S = 0.03             # spent on a point, if that are enough calls
_LAYERS_POINT_S = 0.05      # on one of WAKING
_LONG_POINT_S = 0.15        # a point that takes so long has two calls at least, others _MIN_CALLS
_MIN_CALLS, _MAX_CALLS = 5, 100
_FASTEST_PART, _MANY_CALLS = 0.15, 20
_MAX_CALL_S = 0.12          # a curve ends before its calls take longer
_MIN_POINTS = 3


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """Holds seconds; each curve ascends in rows. serving/link/epoch.py's DeviceProfile says what is in which."""

    expert_s: Curve             # `pair_s` included
    dense_s: Curve
    head_s: Curve
    attention_s: float
    layer_overhead_s: float
    pair_s: float               # of one row for one expert, besides the expert: planned, picked and sent back


class DeviceProbe:
    """Computes on the calling thread and those that the kernels have.

    Holds some 200 MB until it is dropped; of a very large model also the attention weights of one layer.
    """

    def __init__(self, args: ModelArgs, dtype: torch.dtype, kernels: Kernels) -> None:
        self._args = _measurable(args)
        self._clock = work_clock_of(kernels.device, kernels.num_threads)
        self._experts = ExpertGroups(self._args, dtype, kernels)
        self._layers = Layers(self._args, dtype, kernels, self._clock, self._experts)

    @torch.inference_mode()
    def measure(self) -> Timings:
        """Time all points once. Two passes of a quiet machine differ little."""
        timings: Timings = {}
        experts, layers = self._experts, self._layers
        timings["no rows", 0] = _fastest(lambda: experts.compute(0), self._clock)
        self._curve(timings, "experts", experts.compute, self._clock)

        def work_s() -> float:
            return layers.work_s
        for num_rows in (1, OTHERS_ROWS):
            timings["layers for others", num_rows] = _fastest(partial(layers.forward, 0, num_rows), work_s,
                                                              _LAYERS_POINT_S)
        self._curve(timings, "layers", layers.forward, work_s, _LAYERS_POINT_S)
        self._curve(timings, "head", layers.head, work_s)
        for context_tokens in (1, layers.context_tokens):
            timings["attention", context_tokens] = _fastest(layers.attention_call(context_tokens), self._clock)
        return timings

    def times(self, timings: Timings) -> DeviceTimes:
        """Return what the fastest calls say of one expert, one layer, one token."""
        experts, layers = self._experts, self._layers
        idle_s, busy_s = (timings["layers for others", rows] / layers.num_layers(0) for rows in (1, OTHERS_ROWS))
        pairs_per_row = self._args.num_experts_per_tok
        pair_s = max(0.0, busy_s - idle_s) / (pairs_per_row * (OTHERS_ROWS - 1))
        expert_s = tuple((rows, rows * pair_s + (seconds - timings["no rows", 0]) / experts.num_experts * experts.scale)
                         for rows, seconds in _points(timings, "experts"))
        dense_s = tuple((rows, seconds / layers.num_layers(rows) - idle_s - rows * pairs_per_row * pair_s)
                        for rows, seconds in _points(timings, "layers"))
        head_s = tuple((rows, seconds * layers.head_scale) for rows, seconds in _points(timings, "head"))
        extra_s = timings["attention", layers.context_tokens] - timings["attention", 1]
        attention_s = max(0.0, extra_s) / (NUM_SEQUENCES * (layers.context_tokens - 1))
        return DeviceTimes(_ascending(expert_s), _ascending(dense_s), _ascending(head_s), attention_s, idle_s, pair_s)

    @staticmethod
    def _curve(timings: Timings, what: str, call: Callable[[int], object], clock: Callable[[], float],
               point_s: float | None = None) -> None:
        for index, rows in enumerate(ROWS):
            if index >= _MIN_POINTS and timings[what, ROWS[index - 1]] * rows / ROWS[index - 1] > _MAX_CALL_S:
                return
            timings[what, rows] = _fastest(partial(call, rows), clock, point_s)


def _fastest(call: Callable[[], object], clock: Callable[[], float], point_s: float | None = None) -> float:
    """Return the seconds of a call that is among the fastest of enough: other work on the machine only ever slows a
    call down, but the very fastest one may have found some weights in a cache."""
    calls_s: list[float] = []
    begin_s = time.perf_counter()
    end_s = begin_s + (_POINT_S if point_s is None else point_s)
    while True:
        before_s = clock()
        call()
        calls_s.append(clock() - before_s)
        num_calls, now_s = len(calls_s), time.perf_counter()
        is_enough = num_calls >= _MIN_CALLS or (num_calls >= 2 and now_s - begin_s > _LONG_POINT_S)
        if is_enough and (now_s > end_s or num_calls >= _MAX_CALLS):
            return sorted(calls_s)[int(_FASTEST_PART * num_calls) if num_calls >= _MANY_CALLS else 0]


def _points(timings: Timings, what: str) -> Iterator[tuple[int, float]]:
    return ((rows, seconds) for (name, rows), seconds in timings.items() if name == what)


def _ascending(curve: Curve) -> Curve:
    """Make a curve ascend: more rows never take less time, what says so is the clock's noise."""
    points: list[tuple[int, float]] = []
    for rows, seconds in curve:
        points.append((rows, max(seconds, points[-1][1] if points else 1e-9)))
    return tuple(points)


def _measurable(args: ModelArgs) -> ModelArgs:
    """Return the model with experts: where it has none, a dense block is one expert that everybody takes."""
    if args.moe_layers:
        return args
    return replace(args, num_experts=1, num_experts_per_tok=1, moe_intermediate_size=args.intermediate_size)
