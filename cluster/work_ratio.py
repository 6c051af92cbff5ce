"""The work that a member does in its steps over what its profile says for the same rows, and profiles corrected by it.
Pure.

A profile is measured by one quiet process. While it serves, a member is slower: others use the same memory and caches,
steps differ from the probe's. P parts of the work: own rows, experts; N (layer, local expert) pairs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from model.args import ModelArgs
from model.step import ScheduledRequest, StepPlan, StepStats
from serving.device_curve import curve_seconds, scaled, seconds_at
from serving.epoch import DeviceProfile, WorkRatio

MIN_STEPS, MIN_WORK_S = 20.0, 2.0   # one of them, recently, before a ratio says anything
RATIO_RANGE = (0.25, 4.0)           # beyond it something else is wrong, and no plan may rest on it


class WorkMeter:
    """Of one member, over all its epochs and placements. A step counts half after `half_life_s` seconds.

    Steps count by their work, so long ones weigh more. Times come from one clock.
    """

    def __init__(self, profile: DeviceProfile, args: ModelArgs, half_life_s: float, now_s: float) -> None:
        self._profile = profile
        self._args = args
        self._half_life_s = half_life_s
        self._at_s = now_s
        self._num_steps = 0
        self._measured_P, self._expected_P = np.zeros(2), np.zeros(2)   # seconds
        self._steps_P = np.zeros(2)

    def add(self, plan: StepPlan, stats: StepStats, now_s: float) -> None:
        """A step that was done. One that was not timed does not count."""
        if stats.work is None:
            return
        self._age(now_s)
        self._num_steps += 1
        expected_P = np.array([self._own_rows_s(plan), self._experts_s(stats.expert_rows)])
        takes_part_P = expected_P > 0
        self._measured_P += np.array([stats.work.own_s, stats.work.experts_s]) * takes_part_P
        self._expected_P += expected_P
        self._steps_P += takes_part_P

    def snapshot(self, now_s: float) -> WorkRatio | None:
        """None until enough was measured of any part."""
        self._age(now_s)
        own, experts = (self._ratio(part) for part in range(2))
        return None if own is None and experts is None else WorkRatio(own, experts, self._num_steps)

    def _ratio(self, part: int) -> float | None:
        is_enough = self._steps_P[part] >= MIN_STEPS or self._measured_P[part] >= MIN_WORK_S
        return float(self._measured_P[part] / self._expected_P[part]) if is_enough else None

    def _age(self, now_s: float) -> None:
        remains = 0.5 ** ((now_s - self._at_s) / self._half_life_s)
        self._at_s = now_s
        for sums_P in (self._measured_P, self._expected_P, self._steps_P):
            sums_P *= remains

    def _own_rows_s(self, plan: StepPlan) -> float:
        """As StepCosts.own_rows_s, without the overhead."""
        if not plan.requests:
            return 0.0
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

    def _experts_s(self, expert_rows: Sequence[Sequence[int]]) -> float:
        """With the layers' overhead, most of which is the planning of whose rows go to which expert.

        0 without rows for the experts here: then nothing but overhead was measured.
        """
        rows_N = np.fromiter(chain.from_iterable(expert_rows), np.float64)
        if not rows_N.any():
            return 0.0
        return float(seconds_at(self._profile.expert_s, rows_N).sum()
                     + self._args.num_layers * self._profile.layer_overhead_s)


def corrected(profile: DeviceProfile, ratio: WorkRatio | None) -> DeviceProfile:
    """The profile by which the measured steps would have taken as long as they did. Ratios are kept within RATIO_RANGE.

    What has no ratio, and the speeds, which say what limits a step, stay as they are.
    """
    if ratio is None:
        return profile
    own, experts = _within_range(ratio.own), _within_range(ratio.experts)
    return replace(
        profile, expert_s=scaled(profile.expert_s, experts), layer_overhead_s=profile.layer_overhead_s * experts,
        dense_s=scaled(profile.dense_s, own), head_s=scaled(profile.head_s, own),
        attention_s=profile.attention_s * own)


def _within_range(ratio: float | None) -> float:
    return 1.0 if ratio is None else min(max(ratio, RATIO_RANGE[0]), RATIO_RANGE[1])


def _num_attended(request: ScheduledRequest, window: int | None) -> int:
    """Cached tokens that all rows of a request read in one layer, each row's own included."""
    first, last = request.num_computed_tokens + 1, request.num_computed_tokens + len(request.token_ids)
    if window is None or last <= window:
        return (first + last) * len(request.token_ids) // 2
    return int(np.minimum(np.arange(first, last + 1), window).sum())
