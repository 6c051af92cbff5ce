"""Times what a member computes in a step, in the model's real shapes, with the kernels and classes that run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from model.args import ModelArgs
from model.kernels.protocol import Kernels
from model.pace import work_clock_of
from model.probe_work import MAX_ROWS, NUM_SEQUENCES, ExpertGroups, Layers

ROWS = (1, 4, 16, 64, MAX_ROWS)
Curve = tuple[tuple[int, float], ...]
Timings = dict[tuple[str, int], float]      # (what, rows) -> seconds of the fastest call

_POINT_S = 0.03             # spent on a point, if that are enough calls
_MIN_CALLS, _MAX_CALLS = 3, 100
_MAX_CALL_S = 0.12          # a curve ends before its calls take longer
_MIN_POINTS = 3


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """In seconds; each curve ascends in rows. serving/epoch.py's DeviceProfile says what is in which."""

    expert_s: Curve
    dense_s: Curve
    head_s: Curve
    attention_s: float
    layer_overhead_s: float


class DeviceProbe:
    """Holds some 300 MB of weights until it is dropped. Computes on the calling thread and those that torch has."""

    def __init__(self, args: ModelArgs, dtype: torch.dtype, kernels: Kernels) -> None:
        self._args = _measurable(args)
        self._all_layers = args.num_layers
        self._num_dense = args.num_layers - args.num_moe_layers
        self._kernels = kernels
        self._dtype = dtype
        self._clock = work_clock_of(kernels.device, torch.get_num_threads())
        self._experts = ExpertGroups(self._args, dtype, kernels)
        self._layers = Layers(self._args, dtype, kernels)

    @torch.inference_mode()
    def measure(self) -> Timings:
        """One pass over all points. Two passes of a quiet machine differ little."""
        timings: Timings = {}
        experts, layers = self._experts, self._layers
        timings["no rows", 0] = self._fastest(lambda: experts.compute(0))
        self._curve(timings, "experts", experts.compute)
        timings["idle layers", 0] = self._fastest(lambda: layers.forward(0))
        self._curve(timings, "layers", layers.forward)
        self._curve(timings, "head", layers.head)
        for context_tokens in (1, layers.context_tokens):
            timings["attention", context_tokens] = self._fastest(layers.attention_call(context_tokens))
        return timings

    def times(self, timings: Timings) -> DeviceTimes:
        """What the fastest calls say of one expert, one layer, one token."""
        experts, layers = self._experts, self._layers
        overhead_s = timings["idle layers", 0] / layers.num_layers(0)
        expert_s = tuple((rows, max(0.0, seconds - timings["no rows", 0]) / experts.num_experts * experts.scale)
                         for rows, seconds in _points(timings, "experts"))
        dense_blocks = self._num_dense / self._all_layers * self._args.intermediate_size / max(
            1, self._args.moe_intermediate_size)
        of_expert = dict(expert_s)
        dense_s = tuple((rows, seconds / layers.num_layers(rows) - overhead_s + dense_blocks * of_expert.get(rows, 0.0))
                        for rows, seconds in _points(timings, "layers") if not dense_blocks or rows in of_expert)
        head_s = tuple((rows, seconds * layers.head_scale) for rows, seconds in _points(timings, "head"))
        extra_s = timings["attention", layers.context_tokens] - timings["attention", 1]
        attention_s = max(0.0, extra_s) / (NUM_SEQUENCES * (layers.context_tokens - 1))
        return DeviceTimes(_ascending(expert_s), _ascending(dense_s), _ascending(head_s), attention_s, overhead_s)

    def _curve(self, timings: Timings, what: str, call: Callable[[int], object]) -> None:
        for index, rows in enumerate(ROWS):
            if index >= _MIN_POINTS:
                before = ROWS[index - 1]
                if timings[what, before] * rows / before > _MAX_CALL_S:
                    return
            timings[what, rows] = self._fastest(lambda rows=rows: call(rows))    # type: ignore[misc]

    def _fastest(self, call: Callable[[], object]) -> float:
        """Seconds of the fastest of enough calls: other work on the machine only ever slows a call down."""
        call()
        best_s, spent_s, num_calls = float("inf"), 0.0, 0
        before_s = self._clock()
        while num_calls < _MIN_CALLS or (spent_s < _POINT_S and num_calls < _MAX_CALLS):
            call()
            after_s = self._clock()
            best_s = min(best_s, after_s - before_s)
            spent_s, num_calls, before_s = spent_s + after_s - before_s, num_calls + 1, after_s
        return best_s


def _points(timings: Timings, what: str) -> Iterator[tuple[int, float]]:
    return ((rows, seconds) for (name, rows), seconds in timings.items() if name == what)


def _ascending(curve: Curve) -> Curve:
    """More rows never take less time: what says so is the clock's noise."""
    points: list[tuple[int, float]] = []
    for rows, seconds in curve:
        points.append((rows, max(seconds, points[-1][1] if points else 1e-9)))
    return tuple(points)


def _measurable(args: ModelArgs) -> ModelArgs:
    """A model without experts has dense blocks: one expert that everybody takes."""
    if args.moe_layers:
        return args
    return replace(args, num_experts=1, num_experts_per_tok=1, moe_intermediate_size=args.intermediate_size)
