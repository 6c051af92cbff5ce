"""The work that a member does in its steps over what its profile says for the same rows. Pure.

L MoE layers, P pieces of a member's work for its own rows: L + 1; N (layer, local expert) pairs
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np

from cluster.planner.costs.device_curves import curve_seconds, seconds_at
from cluster.planner.costs.measured_profile import RATIO_RANGE
from model.args import ModelArgs
from model.arrays import FloatArray
from model.step import ScheduledRequest, StepPlan, StepStats
from serving.link.epoch import DeviceProfile, WorkRatio

MIN_STEPS, MIN_WORK_S = 20.0, 2.0   # one of them, recently, before a ratio says anything
ALIKE = 0.1                         # steps and pieces whose expected work differs by so small a part of it


class _Ratios:
    """Keeps mean and spread of measured over expected seconds, weighed by the expected ones: long work counts for more.

    The spread is that between a step and the next one if they are alike: what differs between prefill and decode, or
    drifts, is no surprise to wait for. From absolute differences, which one hiccup cannot spoil.
    """

    def __init__(self) -> None:
        self.num_steps = 0.0
        self._measured_s = 0.0
        self._expected_s = self._ratios_s = self._alike_s = self._differences_s = 0.0
        self._last: tuple[FloatArray, FloatArray] | None = None     # expected seconds and ratios of the last step

    def age(self, remains: float) -> None:
        self.num_steps *= remains
        self._measured_s *= remains
        self._expected_s *= remains
        self._ratios_s *= remains
        self._alike_s *= remains
        self._differences_s *= remains

    def add_step(self, measured_P: FloatArray, expected_P: FloatArray) -> None:
        """Count P pieces of work, the same ones in every step; what is not expected does not count.

        A ratio out of range, as of a node that was suspended, is the limit.
        """
        expects_P = expected_P > 0
        if not expects_P.any():
            return
        ratios_P = np.clip(measured_P / np.where(expects_P, expected_P, 1.0), *RATIO_RANGE)
        self.num_steps += 1
        self._measured_s += float(measured_P[expects_P].sum())
        self._expected_s += float(expected_P.sum())
        self._ratios_s += float(expected_P @ ratios_P)
        if self._last is not None:
            last_expected_P, last_ratios_P = self._last
            weights_P = expected_P * (np.abs(expected_P - last_expected_P) <= ALIKE * expected_P)
            weights_P *= abs(float(expected_P.sum() - last_expected_P.sum())) <= ALIKE * float(expected_P.sum())
            self._alike_s += float(weights_P.sum())
            self._differences_s += float(weights_P @ np.abs(ratios_P - last_ratios_P))
        self._last = expected_P, ratios_P

    @property
    def is_enough(self) -> bool:
        return self.num_steps >= MIN_STEPS or self._measured_s >= MIN_WORK_S

    @property
    def mean(self) -> float:
        return self._ratios_s / self._expected_s

    @property
    def spread(self) -> float:
        """Return the spread as a standard deviation: two normal numbers differ by 2 / sqrt(pi) of it on average."""
        return math.sqrt(math.pi) / 2 * self._differences_s / self._alike_s if self._alike_s else 0.0


class WorkMeter:
    """Times the work of one member, over all its epochs and placements. A step counts half after `half_life_s` seconds.

    Times come from one clock.
    """

    def __init__(self, profile: DeviceProfile, args: ModelArgs, half_life_s: float, now_s: float) -> None:
        self._profile = profile
        self._args = args
        self._half_life_s = half_life_s
        self._at_s = now_s
        self._num_steps = 0
        self._own, self._experts = _Ratios(), _Ratios()
        self._planning_s = self._num_planned = 0.0
        # Between the experts of one MoE layer and the next: attentions, and dense layers' MLPs.
        ends = np.array([*args.moe_layers, args.num_layers])
        self._num_dense_P = np.diff(ends, prepend=-1) - 1
        self._num_attentions_P = self._num_dense_P + np.array([1] * args.num_moe_layers + [0])

    def add(self, plan: StepPlan, stats: StepStats, now_s: float) -> None:
        """Count a step that was done, if it was timed."""
        if stats.work is None:
            return
        self._age(now_s)
        self._num_steps += 1
        if plan.requests:
            self._own.add_step(np.array(stats.work.own_s), self._own_rows_s(plan))
        self._experts.add_step(np.array(stats.work.experts_s), self._experts_s(stats.expert_rows))
        self._planning_s += sum(stats.work.planning_s)
        self._num_planned += len(stats.work.planning_s)

    def snapshot(self, now_s: float) -> WorkRatio | None:
        """Return the ratios of now; None until enough was measured of any part."""
        self._age(now_s)
        own, experts = self._own, self._experts
        if not own.is_enough and not experts.is_enough:
            return None
        return WorkRatio(own.mean if own.is_enough else None, experts.mean if experts.is_enough else None,
                         self._num_steps, own.spread if own.is_enough else 0.0,
                         experts.spread if experts.is_enough else 0.0,
                         self._planning_s / self._num_planned if self._num_planned else None)

    def _age(self, now_s: float) -> None:
        remains = 0.5 ** ((now_s - self._at_s) / self._half_life_s)
        self._at_s = now_s
        self._planning_s *= remains
        self._num_planned *= remains
        self._own.age(remains)
        self._experts.age(remains)

    def _own_rows_s(self, plan: StepPlan) -> FloatArray:
        """Return StepCosts.own_rows_s without overhead, in pieces: before every MoE layer's experts, and after all."""
        args, profile, num_rows = self._args, self._profile, plan.num_tokens
        attended = sum(_num_attended(request, args.sliding_window) for request in plan.requests)
        num_drawn = sum((request.sampling is not None) + len(request.prompt_targets) for request in plan.requests)
        share = len(args.attention_layers) / args.num_layers
        attention_s = curve_seconds(profile.dense_s, num_rows) + share * profile.attention_s * attended
        own_s: FloatArray = self._num_attentions_P * attention_s
        if args.num_layers > args.num_moe_layers:
            scale = args.intermediate_size / args.moe_intermediate_size
            own_s += self._num_dense_P * scale * curve_seconds(profile.expert_s, num_rows)
        own_s[-1] += curve_seconds(profile.head_s, num_drawn)
        return own_s

    def _experts_s(self, expert_rows: Sequence[Sequence[int]]) -> FloatArray:
        """Return the seconds of each layer; 0 where no expert here has rows: there nothing but overhead is measured."""
        rows_N = np.fromiter(chain.from_iterable(expert_rows), np.float64)
        layer_N = np.repeat(np.arange(len(expert_rows)), [len(rows) for rows in expert_rows])
        seconds_N = seconds_at(self._profile.expert_s, rows_N)
        return np.bincount(layer_N, seconds_N, minlength=len(expert_rows)).astype(np.float64)


def _num_attended(request: ScheduledRequest, window: int | None) -> int:
    """Return the cached tokens that all rows of a request read in one layer, each row's own included."""
    first, last = request.num_computed_tokens + 1, request.num_computed_tokens + len(request.token_ids)
    if window is None or last <= window:
        return (first + last) * len(request.token_ids) // 2
    return int(np.minimum(np.arange(first, last + 1), window).sum())
