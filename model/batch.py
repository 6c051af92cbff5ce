"""Turns a StepPlan into the tensors of one step, built on the CPU in a handful of numpy calls.

T rows of the step, S sequences, M blocks of the longest block table, L rows whose logits are needed
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from model.kernels.protocol import AttentionBatch
from model.step import StepPlan


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Holds what the forward needs. `sampled_rows` has one row for each request that draws a token, in plan order."""

    token_ids_T: Tensor                 # int64, CPU
    attention: AttentionBatch
    sampled_rows: list[int]
    first_rows_S: list[int]             # where each request's rows begin


def build_batch(plan: StepPlan, block_size: int, num_blocks: int, num_state_slots: int = 0) -> StepBatch:
    """Return the tensors of a step. Raises ValueError when a block table is too short or leaves the cache: a bug of the
    scheduler that the C kernels would answer by writing over other memory."""
    requests = plan.requests
    query_lens_S = np.array([len(request.token_ids) for request in requests], dtype=np.int64)
    computed_S = np.array([request.num_computed_tokens for request in requests], dtype=np.int64)
    starts_S1 = np.zeros(len(requests) + 1, dtype=np.int64)
    np.cumsum(query_lens_S, out=starts_S1[1:])
    num_rows = int(starts_S1[-1])
    token_ids_T = np.fromiter(chain.from_iterable(request.token_ids for request in requests), np.int64, num_rows)
    positions_T = np.arange(num_rows) + np.repeat(computed_S - starts_S1[:-1], query_lens_S)
    tables_SM = np.zeros((len(requests), max((len(r.block_table) for r in requests), default=0)), dtype=np.int32)
    for index, request in enumerate(requests):
        num_tokens = request.num_computed_tokens + len(request.token_ids)
        if not request.token_ids or len(request.block_table) * block_size < num_tokens:
            raise ValueError(f"request {request.request_id} has {len(request.token_ids)} tokens to compute and "
                             f"{len(request.block_table)} blocks of {block_size} for {num_tokens} tokens")
        tables_SM[index, :len(request.block_table)] = request.block_table
    if tables_SM.size and not 0 <= tables_SM.min() <= tables_SM.max() < num_blocks:
        raise ValueError(f"block ids {tables_SM.min()}..{tables_SM.max()} in a KV cache of {num_blocks} blocks")
    sequences_T = np.repeat(np.arange(len(requests)), query_lens_S)
    slots_T = tables_SM[sequences_T, positions_T // block_size].astype(np.int64) * block_size + positions_T % block_size
    attention = AttentionBatch(
        query_starts_S1=torch.from_numpy(starts_S1.astype(np.int32)),
        context_lens_S=torch.from_numpy((computed_S + query_lens_S).astype(np.int32)),
        block_tables_SM=torch.from_numpy(tables_SM),
        positions_T=torch.from_numpy(positions_T.astype(np.int32)),
        slots_T=torch.from_numpy(slots_T),
        **_state_slots(plan, num_state_slots))
    ends = starts_S1[1:].tolist()
    return StepBatch(torch.from_numpy(token_ids_T), attention,
                     [end - 1 for request, end in zip(requests, ends, strict=True) if request.sampling is not None],
                     starts_S1[:-1].tolist())


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
