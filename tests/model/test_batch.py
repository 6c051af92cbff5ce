"""Rows of a step lie where the plan says."""

from __future__ import annotations

import pytest

from model.batch import build_batch
from model.step import SamplingSpec, ScheduledRequest, StepPlan


def test_mixed_prefill_and_decode() -> None:
    plan = StepPlan(1, 0, (
        ScheduledRequest("decode", (7,), 5, (9, 2), SamplingSpec()),
        ScheduledRequest("chunk", (1, 2, 3, 4, 5), 2, (3, 0, 8, 6)),
        ScheduledRequest("last chunk", (6, 6), 0, (1,), SamplingSpec())))
    batch = build_batch(plan, block_size=4, num_blocks=10)
    assert batch.token_ids_T.tolist() == [7, 1, 2, 3, 4, 5, 6, 6]
    assert batch.attention.query_starts_S1.tolist() == [0, 1, 6, 8]
    assert batch.attention.context_lens_S.tolist() == [6, 7, 2]
    assert batch.attention.positions_T.tolist() == [5, 2, 3, 4, 5, 6, 0, 1]
    assert batch.attention.slots_T.tolist() == [9, 14, 15, 0, 1, 2, 4, 5]
    assert batch.attention.block_tables_SM.tolist() == [[9, 2, 0, 0], [3, 0, 8, 6], [1, 0, 0, 0]]
    assert batch.sampled_rows == [0, 7] and batch.first_rows_S == [0, 1, 6]


def test_empty_plan() -> None:
    batch = build_batch(StepPlan(1, 0, ()), block_size=4, num_blocks=10)
    assert batch.token_ids_T.shape == (0,) and batch.attention.query_starts_S1.tolist() == [0]
    assert batch.sampled_rows == []


@pytest.mark.parametrize("request_", [
    ScheduledRequest("r", (1, 2), 3, (0,)), ScheduledRequest("r", (), 0, (0,)),
    ScheduledRequest("r", (1,), 0, (10,)), ScheduledRequest("r", (1,), 0, (-1,))])
def test_a_plan_that_cannot_be_is_refused(request_: ScheduledRequest) -> None:
    with pytest.raises(ValueError, match="request r has|block ids"):
        build_batch(StepPlan(1, 0, (request_,)), block_size=4, num_blocks=10)
