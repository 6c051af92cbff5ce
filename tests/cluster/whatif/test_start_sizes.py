"""How few devices hold a model, when the largest come first and when the smallest do."""

from __future__ import annotations

import pytest

from cluster.planner.memory_plan import MemberMemory
from cluster.planner.placement_plan import PlanOptions
from cluster.whatif.start_sizes import StartSizes, start_sizes
from tests.cluster.coordinator.group_reports import DEMAND

# 12 experts of 100 bytes each in all; who takes requests needs 100 more, who does not 20.
LARGE, SMALL = 1300, 520


@pytest.mark.parametrize(("budgets", "min_copies", "expected"), [
    ((LARGE,), 1, StartSizes(1, 1)),
    ((SMALL, LARGE, SMALL, SMALL), 1, StartSizes(1, 3)),
    ((SMALL, SMALL, SMALL), 1, StartSizes(3, 3)),
    ((LARGE, LARGE, LARGE), 2, StartSizes(2, 2)),
])
def test_a_group_starts_with_as_few_as_hold_the_model(budgets: tuple[int, ...], min_copies: int,
                                                      expected: StartSizes) -> None:
    memories = [MemberMemory(f"d{index}", budget, 0) for index, budget in enumerate(budgets)]
    assert start_sizes(memories, DEMAND, PlanOptions(min_copies=min_copies)) == expected
