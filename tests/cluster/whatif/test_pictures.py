from __future__ import annotations

import base64
import io
from pathlib import Path

import matplotlib.image
import numpy as np

from cluster.whatif.pictures import expert_map_png, member_colours, memory_bars_png
from tests.cluster.whatif.plan_questions import answer

TWO_KINDS = "{nodes: [{name: a, device: h100-sxm, devices: 2}, {name: b, device: a100-40g-sxm, devices: 2}], " \
            "link: {bandwidth: 400GB/s}}"


def pixels(png: str) -> np.ndarray:
    return np.asarray(matplotlib.image.imread(io.BytesIO(base64.b64decode(png))))


def test_every_member_that_holds_experts_is_seen_in_its_colour(tmp_path: Path) -> None:
    plan = answer(tmp_path, TWO_KINDS)
    assert plan.plan is not None
    colours = member_colours(plan)
    assert len(set(colours)) == 4
    seen = pixels(expert_map_png(plan, plan.plan)).reshape(-1, 4)
    counts = [int((np.abs(seen - np.array(colour)).max(axis=1) < 0.01).sum()) for colour in colours]
    for member, count in zip(plan.plan.members, counts, strict=True):
        assert (count > 5000) == (member.num_expert_copies > 16)       # the legend alone has a few hundred


def test_memory_has_a_bar_for_each_member(tmp_path: Path) -> None:
    plan = answer(tmp_path, TWO_KINDS)
    assert plan.plan is not None
    assert pixels(memory_bars_png(plan, plan.plan)).shape[1] == 1100
