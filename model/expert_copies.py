"""Which copy of an expert computes a row. Pure, no torch: the same answer on every member."""

from __future__ import annotations

from collections.abc import Sequence


def choose_copies(holders_of_expert: Sequence[Sequence[int]], owner: int) -> tuple[int, ...]:
    """For each expert of one layer, the rank that computes the rows owned by rank `owner`.

    `holders_of_expert[expert]` = ascending ranks that hold a copy, at least one. The owner's own copy comes first,
    since it costs no transfer; otherwise the copies take turns by (owner + expert) mod their number.
    """
    return tuple(owner if owner in ranks else ranks[(owner + expert) % len(ranks)]
                 for expert, ranks in enumerate(holders_of_expert))
