"""Layers to place, for tests: seeded ones, and what hypothesis draws."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from cluster.planner.layer.problem import LayerProblem
from model.arrays import FloatArray


def zipf_costs(num_experts: int, speeds: tuple[float, ...], exponent: float, seed: int = 0) -> FloatArray:
    """Seconds of each expert on each member; expert loads are a shuffled zipf distribution that adds up to 1."""
    load_E = 1.0 / np.arange(1, num_experts + 1) ** exponent
    np.random.default_rng(seed).shuffle(load_E)
    return (load_E / load_E.sum())[:, None] / np.array(speeds)[None]


@st.composite
def layer_problems(draw: st.DrawFn) -> LayerProblem:
    """Small ones that have room, half of them with a previous placement that has lost something or is too large."""
    num_experts, num_members = draw(st.integers(1, 10)), draw(st.integers(1, 4))
    min_copies = draw(st.integers(1, min(2, num_members)))
    speeds = tuple(draw(st.floats(0.1, 10)) for _ in range(num_members))
    costs_EM = zipf_costs(num_experts, speeds, draw(st.floats(0, 1.5)), draw(st.integers(0, 99)))
    slots = [draw(st.integers(0, num_experts + 1)) for _ in range(num_members)]
    while sum(min(one, num_experts) for one in slots) < num_experts * min_copies:
        slots[slots.index(min(slots))] += 1
    holders = st.sets(st.integers(0, num_members - 1)).map(lambda ranks: tuple(sorted(ranks)))
    previous = tuple(draw(holders) for _ in range(num_experts)) if draw(st.booleans()) else None
    return LayerProblem(costs_EM, tuple(slots), min_copies, previous)
