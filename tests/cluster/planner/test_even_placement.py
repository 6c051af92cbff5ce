"""Equal numbers of experts, as memory allows."""

from __future__ import annotations

from cluster.planner.even_placement import even_holders


def test_equal_and_contiguous() -> None:
    assert even_holders((100, 100), 2, 4, 1) == (((0,), (0,), (1,), (1,)),) * 2


def test_who_has_less_room_holds_what_fits() -> None:
    layers = even_holders((2, 100, 100), 2, 6, 1)
    counts = [sum(ranks == (rank,) for layer in layers for ranks in layer) for rank in range(3)]
    assert counts == [2, 5, 5]


def test_two_copies_are_on_two_members() -> None:
    layers = even_holders((12, 12, 12), 2, 6, 2)
    assert all(len(set(ranks)) == 2 for layer in layers for ranks in layer)
    assert [sum(rank in ranks for layer in layers for ranks in layer) for rank in range(3)] == [8, 8, 8]
