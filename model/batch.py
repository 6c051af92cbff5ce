"""Turns a StepPlan into the tensors of one step, built on the CPU in a handful of numpy calls.

T rows of the step, S sequences, M blocks of the longest block table, L rows whose logits are needed
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from model.arrays import Int32Array
from model.kernels.protocol import AttentionBatch
from model.step import ScheduledRequest, StepPlan


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Holds what the forward needs. `sampled_rows` has one row for each request that draws a token, in plan order."""

    token_ids_T: Tensor                 # int64, CPU
    attention: AttentionBatch
    sampled_rows: list[int]
    first_rows_S: list[int]             # where each request's rows begin


def build_batch(plan: StepPlan, block_size: int, num_blocks: int, num_state_slots: int = 0,
                tables: BlockTables | None = None) -> StepBatch:
    """Return the tensors of a step; `tables` remembers those of the step before.

    Raises ValueError when a block table is too short or leaves the cache: a bug of the scheduler that the C kernels
    would answer by writing over other memory.
    """
    requests = plan.requests
    num_sequences = len(requests)
    query_lens_S = np.fromiter([len(request.token_ids) for request in requests], np.int32, num_sequences)
    context_lens_S = query_lens_S + np.fromiter([request.num_computed_tokens for request in requests], np.int32,
                                                num_sequences)
    tables_SM = (tables or BlockTables()).padded([request.block_table for request in requests])
    _check(requests, query_lens_S, context_lens_S, tables_SM, block_size, num_blocks)
    starts_S1 = np.zeros(num_sequences + 1, dtype=np.int32)
    np.cumsum(query_lens_S, out=starts_S1[1:])
    num_rows = int(starts_S1[-1])
    token_ids_T = np.fromiter(chain.from_iterable([request.token_ids for request in requests]), np.int64, num_rows)
    sequences_T = np.arange(num_sequences)
    if num_rows == num_sequences:           # of each sequence one row
        positions_T = context_lens_S - 1
    else:
        sequences_T = np.repeat(sequences_T, query_lens_S)
        positions_T = np.arange(num_rows, dtype=np.int32) + (context_lens_S - starts_S1[1:])[sequences_T]
    blocks_T, offsets_T = np.divmod(positions_T, block_size)
    slots_T = tables_SM[sequences_T, blocks_T] * np.int64(block_size) + offsets_T
    attention = AttentionBatch(
        query_starts_S1=torch.from_numpy(starts_S1), context_lens_S=torch.from_numpy(context_lens_S),
        block_tables_SM=torch.from_numpy(tables_SM), positions_T=torch.from_numpy(positions_T),
        slots_T=torch.from_numpy(slots_T), **_state_slots(plan, num_state_slots))
    starts = starts_S1.tolist()
    return StepBatch(
        torch.from_numpy(token_ids_T), attention,
        [end - 1 for request, end in zip(requests, starts[1:], strict=True) if request.sampling is not None],
        starts[:-1])


class BlockTables:
    """Makes the block tables of a step from those of the step before. Most are the same objects still, and their ids,
    which lie anywhere in memory, are not read again."""

    def __init__(self) -> None:
        self._tables: list[tuple[int, ...]] = []        # keeps them: as long as it does, nothing else has their id()
        self._row_of: dict[int, int] = {}
        self._padded_SM: Int32Array = np.zeros((0, 0), dtype=np.int32)

    def padded(self, tables: list[tuple[int, ...]]) -> Int32Array:
        """Return them as [S, M], padded with 0."""
        padded_SM = np.zeros((len(tables), max(map(len, tables), default=0)), dtype=np.int32)
        rows, places = [], []
        for row, table in enumerate(tables):
            place = self._row_of.get(id(table))
            if place is None:
                padded_SM[row, :len(table)] = table
            else:
                rows.append(row)
                places.append(place)
        width = min(padded_SM.shape[1], self._padded_SM.shape[1])
        padded_SM[rows, :width] = self._padded_SM[places, :width]
        self._tables, self._padded_SM = tables, padded_SM
        self._row_of = {id(table): row for row, table in enumerate(tables)}
        return padded_SM


def _check(requests: tuple[ScheduledRequest, ...], query_lens_S: Int32Array, context_lens_S: Int32Array,
           tables_SM: Int32Array, block_size: int, num_blocks: int) -> None:
    """Raise ValueError as build_batch says."""
    widths_S = np.fromiter([len(request.block_table) for request in requests], np.int64, len(requests))
    is_wrong_S = (query_lens_S < 1) | (widths_S * block_size < context_lens_S)
    if is_wrong_S.any():
        request = requests[int(is_wrong_S.argmax())]
        raise ValueError(f"request {request.request_id} has {len(request.token_ids)} tokens to compute and "
                         f"{len(request.block_table)} blocks of {block_size} for "
                         f"{request.num_computed_tokens + len(request.token_ids)} tokens")
    if tables_SM.size and not 0 <= tables_SM.min() <= tables_SM.max() < num_blocks:
        raise ValueError(f"block ids {tables_SM.min()}..{tables_SM.max()} in a KV cache of {num_blocks} blocks")


def _state_slots(plan: StepPlan, num_state_slots: int) -> dict[str, Tensor]:
    """No slot is written twice or both written and read, so the sequences of a step can be computed in any order."""
    if not num_state_slots:
        return {}
    reads = [request.state_read for request in plan.requests]
    writes = [request.state_write for request in plan.requests]
    kept = [snapshot for request in plan.requests for snapshot in request.state_snapshots]
    starts_S1 = np.zeros(len(plan.requests) + 1, dtype=np.int32)
    np.cumsum([len(request.state_snapshots) for request in plan.requests], out=starts_S1[1:])
    used = [slot for slot in reads if slot is not None]
    for request in plan.requests:
        if (request.state_read is None) != (request.num_computed_tokens == 0):
            raise ValueError(f"request {request.request_id} goes on from state slot {request.state_read} after "
                             f"{request.num_computed_tokens} tokens")
        ends = [num_tokens for num_tokens, _ in request.state_snapshots]
        if ends != sorted(set(ends)) or any(not 0 < end < len(request.token_ids) for end in ends):
            raise ValueError(f"request {request.request_id} keeps states after {ends} of "
                             f"{len(request.token_ids)} tokens")
    written = [*writes, *(slot for _, slot in kept)]
    if (any(slot is None or not 0 <= slot < num_state_slots for slot in written) or len(set(written)) < len(written)
            or set(written) & set(used) or any(not 0 <= slot < num_state_slots for slot in used)):
        raise ValueError(f"state slots {reads} -> {written} of {num_state_slots}")
    return {"state_reads_S": torch.tensor([-1 if slot is None else slot for slot in reads], dtype=torch.int32),
            "state_writes_S": torch.tensor(writes, dtype=torch.int32),
            "snapshot_starts_S1": torch.from_numpy(starts_S1),
            "snapshot_rows_W": torch.tensor([num_tokens for num_tokens, _ in kept], dtype=torch.int32),
            "snapshot_slots_W": torch.tensor([slot for _, slot in kept], dtype=torch.int32)}
