"""The work that a member does in its steps over what its profile says for the same rows, and profiles corrected by it.
Pure.

A profile is measured by one quiet process. While it serves, a member is slower: others use the same memory and caches,
steps differ from the probe's. It is not always equally slow, and a step waits for whoever is slowest just then: so
plans count what the slowest of as many members is likely to take, and one whose work varies more is given less of it.
L MoE layers, N (layer, local expert) pairs
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from statistics import NormalDist

import numpy as np

from model.args import ModelArgs
from model.step import ScheduledRequest, StepPlan, StepStats
from serving.device_curve import FloatArray, curve_seconds, scaled, seconds_at
from serving.epoch import DeviceProfile, WorkRatio

MIN_STEPS, MIN_WORK_S = 20.0, 2.0   # one of them, recently, before a ratio says anything
RATIO_RANGE = (0.25, 4.0)           # beyond it something else is wrong, and no plan may rest on it


class _Ratios:
    """Mean and spread of measured over expected seconds, weighed by the expected ones: long work counts for more."""

    def __init__(self) -> None:
        self.num_steps = 0.0
        self._measured_s = 0.0
        self._sums = np.zeros(3)        # of the weights, weighed ratios, and weighed squares of ratios

    def age(self, remains: float) -> None:
        self.num_steps *= remains
        self._measured_s *= remains
        self._sums *= remains

    def add_step(self, measured_s: FloatArray, expected_s: FloatArray) -> None:
        """One number for each piece of work. A ratio out of range, as of a node that was suspended, is the limit."""
        ratios = np.clip(measured_s / expected_s, *RATIO_RANGE)
        self.num_steps += 1
        self._measured_s += float(measured_s.sum())
        self._sums += np.array([expected_s.sum(), expected_s @ ratios, expected_s @ ratios**2])

    @property
    def is_enough(self) -> bool:
        return self.num_steps >= MIN_STEPS or self._measured_s >= MIN_WORK_S

    @property
    def mean(self) -> float:
        return float(self._sums[1] / self._sums[0])

    @property
    def spread(self) -> float:
        return math.sqrt(max(0.0, float(self._sums[2] / self._sums[0]) - self.mean**2))


class WorkMeter:
    """Of one member, over all its epochs and placements. A step counts half after `half_life_s` seconds.

    Times come from one clock.
    """

    def __init__(self, profile: DeviceProfile, args: ModelArgs, half_life_s: float, now_s: float) -> None:
        self._profile = profile
        self._args = args
        self._half_life_s = half_life_s
        self._at_s = now_s
        self._num_steps = 0
        self._own, self._experts = _Ratios(), _Ratios()

    def add(self, plan: StepPlan, stats: StepStats, now_s: float) -> None:
        """A step that was done. One that was not timed does not count."""
        if stats.work is None:
            return
        self._age(now_s)
        self._num_steps += 1
        if plan.requests:
            self._own.add_step(np.array([stats.work.own_s]), np.array([self._own_rows_s(plan)]))
        expected_L = self._experts_s(stats.expert_rows)
        has_rows_L = expected_L > 0         # elsewhere nothing but overhead was measured
        if has_rows_L.any():
            self._experts.add_step(np.array(stats.work.experts_s)[has_rows_L], expected_L[has_rows_L])

    def snapshot(self, now_s: float) -> WorkRatio | None:
        """None until enough was measured of any part."""
        self._age(now_s)
        own, experts = self._own, self._experts
        if not own.is_enough and not experts.is_enough:
            return None
        return WorkRatio(own.mean if own.is_enough else None, experts.mean if experts.is_enough else None,
                         self._num_steps, own.spread if own.is_enough else 0.0,
                         experts.spread if experts.is_enough else 0.0)

    def _age(self, now_s: float) -> None:
        remains = 0.5 ** ((now_s - self._at_s) / self._half_life_s)
        self._at_s = now_s
        self._own.age(remains)
        self._experts.age(remains)

    def _own_rows_s(self, plan: StepPlan) -> float:
        """As StepCosts.own_rows_s, without the overhead."""
        args, profile, num_rows = self._args, self._profile, plan.num_tokens
        attended = sum(_num_attended(request, args.sliding_window) for request in plan.requests)
        num_drawn = sum((request.sampling is not None) + len(request.prompt_targets) for request in plan.requests)
        own_s = args.num_layers * (curve_seconds(profile.dense_s, num_rows) + profile.attention_s * attended)
        own_s += curve_seconds(profile.head_s, num_drawn)
        num_dense = args.num_layers - args.num_moe_layers
        if num_dense:
            scale = args.intermediate_size / args.moe_intermediate_size
            own_s += num_dense * scale * curve_seconds(profile.expert_s, num_rows)
        return own_s

    def _experts_s(self, expert_rows: Sequence[Sequence[int]]) -> FloatArray:
        """Of each layer, with its overhead, most of which is the planning of whose rows go to which expert.

        0 where no expert here has rows.
        """
        rows_N = np.fromiter(chain.from_iterable(expert_rows), np.float64)
        layer_N = np.repeat(np.arange(len(expert_rows)), [len(rows) for rows in expert_rows])
        experts_L = np.bincount(layer_N, seconds_at(self._profile.expert_s, rows_N), minlength=len(expert_rows))
        overhead_s = self._args.num_layers * self._profile.layer_overhead_s / max(1, len(expert_rows))
        return np.where(experts_L > 0, experts_L + overhead_s, 0.0)


def corrected(profile: DeviceProfile, ratio: WorkRatio | None, num_members: int) -> DeviceProfile:
    """The profile by which the measured work takes as long as the slowest of so many members is likely to take, if all
    vary as this one does. Ratios are kept within RATIO_RANGE.

    What has no ratio, and the speeds, which say what limits a step, stay as they are.
    """
    if ratio is None:
        return profile
    own, experts = (_planned_ratio(mean, spread, num_members)
                    for mean, spread in ((ratio.own, ratio.own_spread), (ratio.experts, ratio.experts_spread)))
    return replace(
        profile, expert_s=scaled(profile.expert_s, experts), layer_overhead_s=profile.layer_overhead_s * experts,
        dense_s=scaled(profile.dense_s, own), head_s=scaled(profile.head_s, own),
        attention_s=profile.attention_s * own)


def _planned_ratio(mean: float | None, spread: float, num_members: int) -> float:
    if mean is None:
        return 1.0
    return min(max(mean + highest_of(num_members) * spread, RATIO_RANGE[0]), RATIO_RANGE[1])


def highest_of(num: int) -> float:
    """The expected largest of `num` standard normal numbers, as G. Blom (1958) approximates it."""
    return NormalDist().inv_cdf((num - 0.375) / (num + 0.25))


def _num_attended(request: ScheduledRequest, window: int | None) -> int:
    """Cached tokens that all rows of a request read in one layer, each row's own included."""
    first, last = request.num_computed_tokens + 1, request.num_computed_tokens + len(request.token_ids)
    if window is None or last <= window:
        return (first + last) * len(request.token_ids) // 2
    return int(np.minimum(np.arange(first, last + 1), window).sum())
