"""Profiles corrected by measured work."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.planner.costs.measured_profile import RATIO_RANGE, corrected, highest_of
from serving.link.epoch import WorkRatio
from tests.cluster.profiles import PROFILE


def test_what_has_no_ratio_stays_and_what_is_out_of_range_is_cut() -> None:
    assert corrected(PROFILE, None, 3) == PROFILE
    own = corrected(PROFILE, WorkRatio(2.0, None, 20), 3)
    assert own.expert_s == PROFILE.expert_s and own.layer_overhead_s == PROFILE.layer_overhead_s
    assert corrected(PROFILE, WorkRatio(1.0, 1.0, 30, planning_s=3e-5), 3).layer_overhead_s == pytest.approx(3e-5)
    fast = corrected(PROFILE, WorkRatio(1.0, 1.0, 20, planning_s=1e-6), 3)
    assert fast.layer_overhead_s == PROFILE.layer_overhead_s        # which is not planning alone
    assert own.dense_s[1] == (256, 4e-3) and own.head_s[0] == (1, 2e-3) and own.attention_s == 8e-8
    experts = corrected(PROFILE, WorkRatio(None, 100.0, 20), 3)
    assert experts.dense_s == PROFILE.dense_s and experts.expert_s[0] == (1, pytest.approx(4e-5 * RATIO_RANGE[1]))
    assert experts.read_bytes_per_s == PROFILE.read_bytes_per_s
    low = corrected(PROFILE, WorkRatio(0.01, 0.01, 20), 3)
    assert low.attention_s == PROFILE.attention_s * RATIO_RANGE[0]


def test_who_varies_more_is_planned_as_slower() -> None:
    steady, varied = (corrected(PROFILE, WorkRatio(1.2, 1.2, 50, spread, spread), 6) for spread in (0.0, 0.1))
    assert steady == corrected(PROFILE, WorkRatio(1.2, 1.2, 50), 6)
    for curve in ("dense_s", "head_s", "expert_s"):
        seconds, steady_s = (getattr(profile, curve)[0][1] for profile in (varied, steady))
        assert seconds == pytest.approx(steady_s * (1.2 + 0.1282) / 1.2, rel=1e-4)
    alone = corrected(PROFILE, WorkRatio(1.2, 1.2, 50, 0.1, 0.1), 1)
    assert alone == corrected(PROFILE, WorkRatio(1.2, 1.2, 50), 1)      # nobody waits for it


@pytest.mark.parametrize("num_members", [2, 3, 6, 20])
def test_the_highest_of_several_is_what_draws_say(num_members: int) -> None:
    draws = np.random.default_rng(0).standard_normal((40_000, num_members))
    assert highest_of(num_members) == pytest.approx(draws.max(axis=1).mean(), abs=0.03)
