"""Layers that are alike are computed once. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

T = TypeVar("T")


def for_each_layer(keys: Iterable[Hashable], compute: Callable[[int], T]) -> list[T]:
    """Return compute(layer) of each layer; of layers with equal keys only the first is computed."""
    known: dict[Hashable, T] = {}
    results = []
    for layer, key in enumerate(keys):
        if key not in known:
            known[key] = compute(layer)
        results.append(known[key])
    return results
