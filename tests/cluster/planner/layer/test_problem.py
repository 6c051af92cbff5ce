"""A layer that cannot be placed is refused where the problem is made, with what to change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster.planner.layer.error import PlacementError
from cluster.planner.layer.problem import (
    LayerProblem,
    holders_mask,
    mask_holders,
    split_matrix,
)

COSTS_EM = np.full((3, 2), 0.1)
HOLDERS = ((0,), (0, 1), (1,))


@pytest.mark.parametrize(("change", "message"), [
    ({"costs_EM": np.ones(3)}, "costs have shape"), ({"costs_EM": np.ones((3, 0))}, "costs have shape"),
    ({"costs_EM": np.array([[0.1, 0.1], [0.1, np.nan], [0.1, 0.1]])}, "expert 1 costs member 1 nan"),
    ({"costs_EM": np.array([[0.1, -0.1]] * 3)}, "expert 0 costs member 1 -0.1"),
    ({"costs_EM": np.array([[np.inf, 0.1]] * 3)}, "expert 0 costs member 0 inf"),
    ({"slots_M": (3,)}, "1 slots for 2 members"),
    ({"slots_M": (1, 1)}, "3 experts in 1 copies need 3 slots, the members have 2"),
    ({"slots_M": (9, 2), "min_copies": 2}, "need 6 slots, the members have 5"),
    ({"slots_M": (-5, 2)}, "the members have 2"),
    ({"min_copies": 3}, "min_copies=3 with 2 members"), ({"min_copies": 0}, "min_copies=0"),
    ({"previous": ((0,),)}, "has 1 experts, the layer 3"),
    ({"previous": ((0,), (1, 0), ())}, "expert 1 on members"), ({"previous": ((0,), (), (2,))}, "expert 2 on members")])
def test_what_cannot_be_placed_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlacementError, match=message) as error:
        LayerProblem(**({"costs_EM": COSTS_EM, "slots_M": (2, 2)} | change))
    assert error.value.fix


def test_slots_beyond_the_experts_are_of_no_use() -> None:
    assert LayerProblem(COSTS_EM, (9, 2)).room_M.tolist() == [3, 2]


@pytest.mark.parametrize(("previous", "slots", "min_copies", "num_lost"), [
    (None, (3, 3), 1, 3), (HOLDERS, (3, 3), 1, 0), (((0,), (), ()), (3, 3), 1, 2), (HOLDERS, (3, 3), 2, 2),
    (((0,), (0,), (0,)), (1, 3), 1, 2)])
def test_lost_copies_are_those_that_must_be_loaded(previous: tuple[tuple[int, ...], ...] | None, slots: tuple[int, ...],
                                                   min_copies: int, num_lost: int) -> None:
    assert LayerProblem(COSTS_EM, slots, min_copies, previous).num_lost() == num_lost


def test_holders_and_masks_say_the_same() -> None:
    held_EM = holders_mask(HOLDERS, 2)
    assert held_EM.tolist() == [[True, False], [True, True], [False, True]] and mask_holders(held_EM) == HOLDERS
    split = ((1.0,), (0.25, 0.75), (1.0,))
    assert split_matrix(HOLDERS, split, 2).tolist() == [[1.0, 0.0], [0.25, 0.75], [0.0, 1.0]]
    with pytest.raises(ValueError, match="shorter"):
        split_matrix(HOLDERS, split[:2], 2)
