"""A member's profile, corrected by the work that it did in its steps. Pure, and without SciPy.

A profile is measured by one quiet process. While it serves, a member is slower: others use the same memory and caches,
steps differ from the probe's. It is not always equally slow, and a step waits for whoever is slowest just then: so
plans count what the slowest of as many members is likely to take, and one whose work varies more is given less of it.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

from cluster.planner.costs.device_curves import scaled
from serving.link.epoch import DeviceProfile, WorkRatio

RATIO_RANGE = (0.25, 4.0)           # beyond it something else is wrong, and no plan may rest on it


def corrected(profile: DeviceProfile, ratio: WorkRatio | None, num_members: int) -> DeviceProfile:
    """Return the profile by which the measured work takes as long as the slowest of so many members is likely to take.

    All are taken to vary as this one does. Ratios are kept within RATIO_RANGE.

    A layer's overhead is at least what its planning took. What has no ratio, and the speeds, which say what limits a
    step, stay as they are.
    """
    if ratio is None:
        return profile
    own, experts = (_planned_ratio(mean, spread, num_members)
                    for mean, spread in ((ratio.own, ratio.own_spread), (ratio.experts, ratio.experts_spread)))
    return replace(
        profile, expert_s=scaled(profile.expert_s, experts),
        layer_overhead_s=max(profile.layer_overhead_s, ratio.planning_s or 0.0),
        dense_s=scaled(profile.dense_s, own), head_s=scaled(profile.head_s, own),
        attention_s=profile.attention_s * own)


def _planned_ratio(mean: float | None, spread: float, num_members: int) -> float:
    if mean is None:
        return 1.0
    return min(max(mean + highest_of(num_members) * spread, RATIO_RANGE[0]), RATIO_RANGE[1])


def highest_of(num: int) -> float:
    """Return the expected largest of `num` standard normal numbers, as G. Blom (1958) approximates it."""
    return NormalDist().inv_cdf((num - 0.375) / (num + 0.25))
