"""Figures that no device has are named, with the rule that they break."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cluster.planner.costs.profile_check import profile_fault
from serving.link.epoch import DeviceProfile, Link
from tests.cluster.planner.planned_members import profile
from tests.cluster.profiles import PROFILE


@pytest.mark.parametrize(("wrong", "says"), [
    (replace(profile(), expert_s=()), "expert_s is empty"),
    (replace(profile(), dense_s=((1, 1.0), (1, 2.0))), r"dense_s is for rows \[1, 1\]"),
    (replace(profile(), head_s=((4, 1.0), (2, 2.0))), r"head_s is for rows \[4, 2\]"),
    (replace(profile(), head_s=((1, float("nan")),)), "head_s of 1 rows is nan"),
    (replace(profile(), expert_s=((1, 0.0),)), "expert_s of 1 rows is 0.0"),
    (replace(profile(), read_bytes_per_s=0.0), "read_bytes_per_s is 0.0; a speed is finite and above zero"),
    (replace(profile(), gemm_flop_per_s=((1, float("inf")),)), "gemm_flop_per_s is inf"),
    (replace(profile(), attention_s=-1.0), "attention_s is -1.0"),
    (replace(profile(), link=Link(1e-5, 0.0)), "link.bytes_per_s is 0.0"),
    (replace(profile(), link=Link(float("nan"), 1.0)), "link.latency_s is nan"),
    (replace(profile(), emulated_speed=0.0), "emulated_speed is 0.0"),
    (replace(profile(), layer_overhead_s=-1e-6), "layer_overhead_s is -1e-06; a time is finite and not below zero"),
    (replace(profile(), dense_s=((1, 2e-3), (4, 1e-3))), "more rows take no less"),
    (replace(profile(), spread=float("inf")), "spread is inf"),
])
def test_a_wrong_figure_is_named(wrong: DeviceProfile, says: str) -> None:
    assert re.search(says, profile_fault(wrong) or "")


@pytest.mark.parametrize("right", [PROFILE, profile(), replace(profile(), link=None)])
def test_a_right_profile_has_no_fault(right: DeviceProfile) -> None:
    assert profile_fault(right) is None
