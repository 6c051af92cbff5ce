"""The cost rule. That all dispatchers compute the same is in test_dispatch.py."""

from __future__ import annotations

import pytest

from model.dispatch_auto import COLLECTIVE_BYTES, prefers_gather
from model.dispatch_plan import layer_routing
from model.placement import Placement, contiguous_placement


def test_small_steps_gather_and_large_ones_go_all_to_all() -> None:
    row_bytes = 2048
    enough = COLLECTIVE_BYTES // row_bytes + 1
    assert prefers_gather((1, 0, 2), (1.0, 1.0, 1.0), row_bytes, fixed_shapes=False)
    assert not prefers_gather((1, 0, enough), (1.0, 1.0, 1.0), row_bytes, fixed_shapes=False)


def test_rows_that_must_reach_everybody_always_gather() -> None:
    assert prefers_gather((100_000, 5, 0), (2.0, 2.0, 2.0), 8192, fixed_shapes=False)


def test_padding_counts_as_waste() -> None:
    assert not prefers_gather((100_000, 5, 0), (2.0, 2.0, 2.0), 8192, fixed_shapes=True)


def test_one_member_gathers() -> None:
    assert prefers_gather((7,), (0.0,), 8192, fixed_shapes=False)


@pytest.mark.parametrize(("placement", "num_experts_per_token", "expected"), [
    (contiguous_placement(1, 4, (2, 2)), 1, (0.5, 0.5)),
    (contiguous_placement(1, 4, (2, 2)), 2, (0.75, 0.75)),
    (contiguous_placement(1, 4, (4, 0)), 2, (0.0, 1.0)),
    (Placement(2, (((0, 1),) * 4,)), 2, (0.0, 0.0)),
])
def test_reach_is_the_expected_number_of_other_members(
        placement: Placement, num_experts_per_token: int, expected: tuple[float, ...]) -> None:
    routing = layer_routing(placement, 0, 0)
    assert tuple(routing.reach(owner, num_experts_per_token) for owner in range(2)) == expected


def test_more_experts_than_ids_can_name_are_refused() -> None:
    with pytest.raises(ValueError, match="32768 experts"):
        layer_routing(contiguous_placement(1, 32_768, (32_768,)), 0, 0)
