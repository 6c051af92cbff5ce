"""Placement that treats all members alike, as other systems do. For comparisons. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.planner.layer.problem import Holders
from cluster.planner.memory_plan import divide_over_layers


def even_holders(max_slots_M: Sequence[int], num_layers: int, num_experts: int, num_copies: int) -> tuple[Holders, ...]:
    """Give all members equal numbers of experts, contiguous, as far as memory allows.

    sum(max_slots_M) is enough for all copies.
    """
    remaining = equal_slots(max_slots_M, num_layers * num_experts * num_copies)
    layers = []
    for layer in range(num_layers):
        slots = divide_over_layers(num_experts * num_copies, remaining, num_layers - layer)
        remaining = [left - one for left, one in zip(remaining, slots, strict=True)]
        holders: list[list[int]] = [[] for _ in range(num_experts)]
        position = 0
        for rank, count in enumerate(slots):
            for _ in range(count):
                holders[position % num_experts].append(rank)
                position += 1
        layers.append(tuple(tuple(sorted(ranks)) for ranks in holders))
    return tuple(layers)


def equal_slots(max_slots_M: Sequence[int], num_slots: int) -> list[int]:
    """Divide the slots as equally as the limits allow: first to the least room, the others share what is left."""
    slots = [0] * len(max_slots_M)
    left = num_slots
    by_room = sorted(range(len(max_slots_M)), key=lambda rank: (max_slots_M[rank], rank))
    for index, rank in enumerate(by_room):
        slots[rank] = min(max_slots_M[rank], left // (len(by_room) - index))
        left -= slots[rank]
    return slots
