"""Layers with equal keys are computed once."""

from __future__ import annotations

from cluster.planner.costs.alike_layers import for_each_layer


def test_only_the_first_of_equal_layers_is_computed() -> None:
    computed: list[int] = []

    def compute(layer: int) -> str:
        computed.append(layer)
        return f"of {layer}"

    assert for_each_layer("abab", compute) == ["of 0", "of 1", "of 0", "of 1"]
    assert computed == [0, 1]
