"""What stale rates cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.device_curves import expert_rate
from cluster.group_plan import slowdown_of_rates
from cluster.work_ratio import corrected
from model.placement import Placement
from serving.epoch import Epoch, RequestShare, WorkRatio
from tests.cluster.group_reports import member, rules
from tests.cluster.profiles import PROFILE

PLAN = rules().plan
OLD = (expert_rate(PROFILE),) * 3
SLOW_B = corrected(PROFILE, WorkRatio(1.0, 3.0, 50), 2)
NEW = (expert_rate(PROFILE), expert_rate(SLOW_B), expert_rate(PROFILE))
HOLDERS = (((0, 1), (1, 2), (0, 1), (1, 2), (0, 1), (1, 2)),) * 2
SHARES = (RequestShare(0.5, 64), RequestShare(0.0, 0), RequestShare(0.5, 64))


def epoch(placement: Placement) -> Epoch:
    a, b, c = (member(name) for name in "abc")
    return Epoch(1, (a, replace(b, profile=SLOW_B), c), placement, "", SHARES)


@pytest.mark.parametrize("load_LE", [None, np.full((2, 6), 50.0)])
def test_rates_of_before_give_a_slow_member_too_many_rows(load_LE: np.ndarray | None) -> None:
    stale = slowdown_of_rates(epoch(Placement(3, HOLDERS, OLD)), PLAN, load_LE, NEW)
    assert stale > 1.02
    assert slowdown_of_rates(epoch(Placement(3, HOLDERS, NEW)), PLAN, load_LE, OLD) == pytest.approx(1 / stale)


def test_rates_cost_nothing_when_they_are_right_or_nothing_has_copies() -> None:
    assert slowdown_of_rates(epoch(Placement(3, HOLDERS, NEW)), PLAN, None, NEW) == 1.0
    single = Placement(3, (((0,), (1,), (2,), (0,), (1,), (2,)),) * 2, OLD)
    assert slowdown_of_rates(epoch(single), PLAN, None, NEW) == 1.0
