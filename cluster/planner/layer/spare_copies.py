"""Copies beyond those that the expected step needs: with them every step is levelled for the rows that it really has.

A placement is made for the mean of each expert's rows. In a step of few rows, and on a member of few experts, they are
far from it, and the slowest member decides. Rows of an expert that two members hold go to the one that would be done
first (model/dispatch/row_split.py), so a few copies that tie the members to each other take most of that away. Pure.

E experts of a layer, M members
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from cluster.planner.layer.problem import Holders, Split
from model.arrays import FloatArray

SPARE_PART = 1 / 8      # of a layer's experts, and one for each holder: more copies level hardly better


def add_spare_copies(holders: Holders, slots_M: Sequence[int], probability_E: FloatArray, before: Holders | None,
                     may_load: bool) -> Holders:
    """Add copies of one layer's experts in free slots.

    All that `before` had come first, as they need not be loaded, then others, if those may be, up to SPARE_PART.

    Of the others, a member takes an expert with the fewest copies, from the member with which it shares the least, and
    of those the hottest. A member without experts stays without.
    """
    held = [set(ranks) for ranks in holders]
    num_held = Counter(rank for ranks in held for rank in ranks)
    hottest_first = np.argsort(-probability_E, kind="stable").tolist()
    had = before or ((),) * len(holders)
    for expert in hottest_first:
        for rank in had[expert]:
            if rank not in held[expert] and 0 < num_held[rank] < slots_M[rank]:
                held[expert].add(rank)
                num_held[rank] += 1
    if may_load:
        _load_more(held, num_held, slots_M, hottest_first)
    return tuple(tuple(sorted(ranks)) for ranks in held)


def _load_more(held: list[set[int]], num_held: Counter[int], slots_M: Sequence[int],
               hottest_first: Sequence[int]) -> None:
    """Add those that must be loaded. In place."""
    shared = Counter(pair for ranks in held for pair in itertools.combinations(sorted(ranks), 2))
    num_more = round(SPARE_PART * len(held)) + len(num_held) - (num_held.total() - len(held))
    for rank in itertools.islice(_takers(num_held, slots_M), max(0, num_more)):
        options = [expert for expert in hottest_first if rank not in held[expert]]
        if options:
            expert = min(options, key=lambda one: (
                len(held[one]), min(shared[min(rank, other), max(rank, other)] for other in held[one])))
            shared.update((min(rank, other), max(rank, other)) for other in held[expert])
            held[expert].add(rank)


def _takers(num_held: Counter[int], slots_M: Sequence[int]) -> list[int]:
    """Return a rank for each free slot, such that copies are in proportion to what the members hold, and mix."""
    turns = [((turn + 0.5) / count, rank) for rank, count in num_held.items() for turn in range(slots_M[rank] - count)]
    return [rank for _, rank in sorted(turns)]


def spare_split(split: Split, holders: Holders, more: Holders) -> Split:
    """Return the expected parts of all holders that there are now: the new ones are expected to compute nothing."""
    parts = [dict(zip(ranks, fractions, strict=True)) for ranks, fractions in zip(holders, split, strict=True)]
    return tuple(tuple(part.get(rank, 0.0) for rank in ranks) for part, ranks in zip(parts, more, strict=True))
