"""Rows of a step lie where the plan says."""

from __future__ import annotations

import pytest
import torch

from model.batch import BlockTables, build_batch
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


def test_tables_of_the_step_before_are_taken_again_wherever_their_sequence_is_now() -> None:
    a, b, c, d = (4, 1, 7), (3,), (9, 8), (5, 6)
    longer_b, shorter_a = (3, 0, 0, 2, 11), (4, 1)
    steps = [[a, b, c], [c, a, longer_b], [longer_b], [], [d, longer_b, shorter_a, a], [d], [b, d]]
    known = BlockTables()
    for tables in steps:
        width = max(map(len, tables), default=0)
        expected = [[*table, *[0] * (width - len(table))] for table in tables]
        assert known.padded(list(tables)).tolist() == expected


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


def with_states(read: int | None, write: int | None, *snapshots: tuple[int, int], done: int = 4,
                request_id: str = "r", block: int = 0) -> ScheduledRequest:
    return ScheduledRequest(request_id, (1, 2, 3), done, (block, block + 1), state_read=read, state_write=write,
                            state_snapshots=snapshots)


def test_state_slots_of_a_step() -> None:
    plan = StepPlan(1, 0, (with_states(None, 3, (1, 0), (2, 6), done=0), with_states(5, 2, request_id="s", block=2),
                           with_states(7, 1, (2, 4), request_id="t", block=4)))
    attention = build_batch(plan, block_size=4, num_blocks=10, num_state_slots=8).attention
    found = (attention.state_reads_S, attention.state_writes_S, attention.snapshot_starts_S1, attention.snapshot_rows_W,
             attention.snapshot_slots_W)
    assert [numbers.tolist() for numbers in found if numbers is not None] == [
        [-1, 5, 7], [3, 2, 1], [0, 2, 2, 3], [1, 2, 2], [0, 6, 4]]
    assert all(numbers is not None and numbers.dtype is torch.int32 for numbers in found)


def test_two_sequences_may_go_on_from_one_snapshot() -> None:
    plan = StepPlan(1, 0, (with_states(5, 0), with_states(5, 1, request_id="s", block=2)))
    attention = build_batch(plan, 4, 10, 8).attention
    assert attention.state_reads_S is not None and attention.state_reads_S.tolist() == [5, 5]


@pytest.mark.parametrize("requests", [
    (with_states(None, 0),), (with_states(1, 0, done=0),),                              # begins late, or goes on early
    (with_states(1, None),), (with_states(1, 8),), (with_states(1, -1),), (with_states(8, 0),), (with_states(-1, 0),),
    (with_states(1, 1),),                                                               # reads what it writes
    (with_states(1, 0), with_states(0, 2, request_id="s", block=2)),                    # reads what another one writes
    (with_states(1, 0), with_states(2, 0, request_id="s", block=2)),                    # two write one slot
    (with_states(1, 0, (1, 0)),), (with_states(1, 0, (1, 1)),), (with_states(1, 0, (1, 8)),),
    (with_states(1, 0, (1, 2), (2, 2)),), (with_states(1, 0, (0, 2)),), (with_states(1, 0, (3, 2)),),
    (with_states(1, 0, (2, 2), (1, 3)),), (with_states(1, 0, (1, 2), (1, 3)),)])
def test_state_slots_that_cannot_be_are_refused(requests: tuple[ScheduledRequest, ...]) -> None:
    with pytest.raises(ValueError, match="state slots|goes on from state slot|keeps states after"):
        build_batch(StepPlan(1, 0, requests), 4, 10, 8)


def test_models_without_such_layers_have_no_state_slots() -> None:
    attention = build_batch(StepPlan(1, 0, (with_states(None, None),)), 4, 10).attention
    assert attention.state_reads_S is attention.state_writes_S is attention.snapshot_starts_S1 is None
