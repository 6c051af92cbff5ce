"""Gated DeltaNet in plain torch: the causal convolution, and the recurrence token by token.

Rows of a sequence are computed by themselves, in the order of their positions, so a chunk gives the bits that its
tokens would have given one by one.

T rows of the step, C channels of the convolution, c rows that it looks back, N state slots, H value heads, k key head
size, v value head size, n rows of one sequence
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.kernels.protocol import AttentionBatch

_EPS = 1e-6         # of the norm of queries and keys, as in the reference
Map = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def sequences_of(batch: AttentionBatch) -> Iterator[tuple[slice, int, dict[int, int]]]:
    """Yield each sequence's rows, the slot that it reads (-1: it begins) and the slots that it writes, by the number of
    its rows after which."""
    assert batch.state_reads_S is not None and batch.state_writes_S is not None
    starts, snapshots = batch.query_starts_S1.tolist(), _snapshots(batch)
    for index, (read, write) in enumerate(zip(batch.state_reads_S.tolist(), batch.state_writes_S.tolist(),
                                              strict=True)):
        rows = slice(starts[index], starts[index + 1])
        yield rows, read, snapshots[index] | {rows.stop - rows.start: write}


def _snapshots(batch: AttentionBatch) -> list[dict[int, int]]:
    starts, rows, slots = batch.snapshot_starts_S1, batch.snapshot_rows_W, batch.snapshot_slots_W
    if starts is None or rows is None or slots is None:
        return [{} for _ in range(batch.query_starts_S1.shape[0] - 1)]
    pairs = list(zip(rows.tolist(), slots.tolist(), strict=True))
    return [dict(pairs[first:last]) for first, last in itertools.pairwise(starts.tolist())]


def causal_conv(x_TC: Tensor, weight_KC: Tensor, conv_NcC: Tensor, batch: AttentionBatch, map_: Map) -> Tensor:
    """Each row with the c rows before it, in fp32, ascending; then silu, rounded once -> [T, C], dtype of x."""
    out_TC = torch.empty_like(x_TC)
    num_back = conv_NcC.shape[1]
    for rows, read, writes in sequences_of(batch):
        x_nC = x_TC[rows]
        before_cC = torch.zeros_like(conv_NcC[0]) if read < 0 else conv_NcC[read]
        window_C = torch.cat((before_cC, x_nC))
        sum_nC = torch.zeros(x_nC.shape, dtype=torch.float32, device=x_TC.device)
        for back in range(num_back + 1):
            sum_nC += window_C[back:back + x_nC.shape[0]].float() * weight_KC[back].float()
        out_TC[rows] = map_(torch.nn.functional.silu, sum_nC).to(x_TC.dtype)
        for num_rows, slot in writes.items():
            conv_NcC[slot] = window_C[num_rows:num_rows + num_back]
    return out_TC


def gated_delta_rule(q_THk: Tensor, k_THk: Tensor, v_THv: Tensor, decay_TH: Tensor, beta_TH: Tensor,
                     recurrent_NHkv: Tensor, batch: AttentionBatch) -> Tensor:
    """S <- S decay + k (beta (v - (S decay) k)), out = S q, row by row -> [T, H, v] fp32. q, k, v fp32, not yet
    normalized; q and k already repeated for the value heads (Yang et al., Gated Delta Networks, 2024)."""
    q_THk = _normalized(q_THk) * q_THk.shape[-1] ** -0.5
    k_THk = _normalized(k_THk)
    out_THv = torch.empty_like(v_THv)
    for rows, read, writes in sequences_of(batch):
        state_Hkv = torch.zeros_like(recurrent_NHkv[0]) if read < 0 else recurrent_NHkv[read].clone()
        for row in range(rows.start, rows.stop):
            state_Hkv *= decay_TH[row, :, None, None]
            k_Hk1 = k_THk[row].unsqueeze(-1)
            delta_Hv = (v_THv[row] - (state_Hkv * k_Hk1).sum(dim=1)) * beta_TH[row, :, None]
            state_Hkv += k_Hk1 * delta_Hv.unsqueeze(1)
            out_THv[row] = (state_Hkv * q_THk[row].unsqueeze(-1)).sum(dim=1)
            slot = writes.get(row + 1 - rows.start)
            if slot is not None:
                recurrent_NHkv[slot] = state_Hkv
    return out_THv


def _normalized(x_THk: Tensor) -> Tensor:
    return x_THk * torch.rsqrt(x_THk.square().sum(dim=-1, keepdim=True) + _EPS)
