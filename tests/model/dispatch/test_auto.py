"""The cost rule. That all dispatchers compute the same is in test_dispatcher.py."""

from __future__ import annotations

import pytest

from model.dispatch import row_planner
from model.dispatch.auto import AutoDispatcher, prefers_gather
from model.dispatch.exchange import RowExchange
from model.dispatch.row_plan import layer_routing
from model.dispatch.silent_group import SilentGroup
from model.kernels.torch_kernels import TorchKernels
from tests.placements import contiguous_placement


def test_small_steps_gather_and_large_ones_go_all_to_all() -> None:
    row_bytes, collective_bytes = 2048, 64 << 10
    enough = collective_bytes // row_bytes + 1
    assert prefers_gather((1, 0, 2), (1.0, 1.0, 1.0), row_bytes, False, collective_bytes)
    assert not prefers_gather((1, 0, enough), (1.0, 1.0, 1.0), row_bytes, False, collective_bytes)


def test_what_a_collective_is_worth_decides() -> None:
    wasted_bytes = 4 * 1000 * 2048          # 1000 rows go to 5 others, of whom each row needs 1
    ask = ((1000, 0, 0, 0, 0, 0), (1.0,) * 6, 2048, False)
    assert prefers_gather(*ask, collective_bytes=wasted_bytes)
    assert not prefers_gather(*ask, collective_bytes=wasted_bytes - 1)


def test_rows_that_must_reach_everybody_always_gather() -> None:
    assert prefers_gather((100_000, 5, 0), (2.0, 2.0, 2.0), 8192, False, 0)


def test_padding_counts_as_waste() -> None:
    assert not prefers_gather((100_000, 5, 0), (2.0, 2.0, 2.0), 8192, True, 1 << 20)


def test_one_member_gathers() -> None:
    assert prefers_gather((7,), (0.0,), 8192, False, 0)


def test_the_tables_of_a_layer_are_made_once_for_both_dispatchers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(row_planner, "layer_routing", lambda placement, layer, rank: (
        made.append(layer), layer_routing(placement, layer, rank))[1])
    AutoDispatcher(RowExchange(TorchKernels("cpu"), contiguous_placement(3, 4, (2, 2)), 0, SilentGroup()))
    assert made == [0, 1, 2]
