"""Computes paged attention in plain torch: with rows that do not depend on their batch, or by torch's own kernels.

S sequences, n query rows of one tile, H query heads, G key/value heads, g = H / G, d head size, C keys of a block,
b key blocks, M blocks of a block table, B block size of the KV cache
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from model.kernels.pieces import in_pieces
from model.kernels.protocol import AttentionBatch

KEYS_PER_BLOCK = 64
ROWS_PER_TILE = 32


def attend_in_blocks(q_THd: Tensor, cache: Tensor, batch: AttentionBatch, scale: float,
                     sliding_window: int | None) -> Tensor:
    """Attend, fp32 inside. Key blocks begin at multiples of 64 positions and are added in order; a block that a row may
    not see adds exact zeros, so the longest row of a tile does not change the others."""
    out_THd = torch.empty_like(q_THd)
    starts = batch.query_starts_S1.tolist()
    for sequence, context_len in enumerate(batch.context_lens_S.tolist()):
        keys_PGd, values_PGd = _gather(cache, batch.block_tables_SM[sequence], context_len)
        first_position = context_len - (starts[sequence + 1] - starts[sequence])
        for first in range(starts[sequence], starts[sequence + 1], ROWS_PER_TILE):
            last = min(first + ROWS_PER_TILE, starts[sequence + 1])
            position = first_position + first - starts[sequence]
            out_THd[first:last] = _attend_tile(q_THd[first:last], keys_PGd, values_PGd, position, scale, sliding_window)
    return out_THd


def _gather(cache: Tensor, block_table_M: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
    """Return keys and values of positions 0.. in fp32 [P, G, d], P padded with zeros to whole key blocks."""
    block_size = cache.shape[2]
    blocks = block_table_M[:-(-context_len // block_size)].long()
    padding = (0, 0, 0, 0, 0, -context_len % KEYS_PER_BLOCK)
    keys_PGd, values_PGd = (cache[i][blocks].flatten(0, 1)[:context_len].float() for i in (0, 1))
    return functional.pad(keys_PGd, padding), functional.pad(values_PGd, padding)


def _attend_tile(q_nHd: Tensor, keys_PGd: Tensor, values_PGd: Tensor, first_position: int, scale: float,
                 sliding_window: int | None) -> Tensor:
    """Attend with rows at positions first_position, first_position + 1, ...: always a whole tile of GEMM rows."""
    num_rows, num_heads, head_dim = q_nHd.shape
    num_kv_heads = keys_PGd.shape[1]
    num_blocks = -(-(first_position + num_rows) // KEYS_PER_BLOCK)
    q_nHd = functional.pad(q_nHd.float(), (0, 0, 0, 0, 0, ROWS_PER_TILE - num_rows))
    q_Gmd = q_nHd.view(ROWS_PER_TILE, num_kv_heads, -1, head_dim).transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    visible_nP = _visible(first_position, num_blocks * KEYS_PER_BLOCK, sliding_window)
    scores_bGmC = torch.stack([torch.bmm(q_Gmd, block_CGd.permute(1, 2, 0))
                               for block_CGd in torch.split(keys_PGd, KEYS_PER_BLOCK)[:num_blocks]])
    hidden = ~visible_nP.view(ROWS_PER_TILE, num_blocks, KEYS_PER_BLOCK).transpose(0, 1)
    hidden_bmC = hidden.repeat_interleave(num_heads // num_kv_heads, dim=1)
    scores_bGmC = (scores_bGmC * scale).masked_fill_(hidden_bmC.unsqueeze(1), float("-inf"))
    top_Gm = scores_bGmC.amax(dim=(0, 3))
    weights_bGmC = in_pieces(torch.exp, scores_bGmC - top_Gm.unsqueeze(-1))
    total_Gm = torch.zeros_like(top_Gm)
    out_Gmd = torch.zeros_like(q_Gmd)
    for weights_GmC, block_CGd in zip(weights_bGmC, torch.split(values_PGd, KEYS_PER_BLOCK), strict=False):
        total_Gm += weights_GmC.sum(dim=-1)
        out_Gmd += torch.bmm(weights_GmC, block_CGd.transpose(0, 1))
    out_Gmd /= total_Gm.unsqueeze(-1)
    return out_Gmd.view(num_kv_heads, ROWS_PER_TILE, -1, head_dim).transpose(0, 1).reshape(
        ROWS_PER_TILE, num_heads, head_dim)[:num_rows]


def _visible(first_position: int, num_keys: int, sliding_window: int | None) -> Tensor:
    """Return [tile rows, keys]: may the row see the key. A padding row may see none and become NaN; it is cut off."""
    positions_n1 = torch.arange(first_position, first_position + ROWS_PER_TILE).unsqueeze(1)
    keys_P = torch.arange(num_keys)
    visible = keys_P <= positions_n1
    if sliding_window is not None:
        visible &= keys_P > positions_n1 - sliding_window
    return visible


def attend_with_sdpa(q_THd: Tensor, cache: Tensor, batch: AttentionBatch, scale: float,
                     sliding_window: int | None) -> Tensor:
    """Attend with single-row sequences together in one padded call, with each longer chunk in a call of its own."""
    out_THd = torch.empty_like(q_THd)
    query_lens = batch.query_starts_S1.diff()
    decodes = (query_lens == 1).nonzero().flatten()
    if decodes.numel():
        rows = batch.query_starts_S1[decodes].long().to(q_THd.device)
        out_THd[rows] = _attend_decodes(q_THd[rows], cache, batch, decodes, scale, sliding_window)
    for sequence in (query_lens > 1).nonzero().flatten().tolist():
        first, last = int(batch.query_starts_S1[sequence]), int(batch.query_starts_S1[sequence + 1])
        out_THd[first:last] = _attend_chunk(q_THd[first:last], cache, batch, sequence, scale, sliding_window)
    return out_THd


def _attend_decodes(q_SHd: Tensor, cache: Tensor, batch: AttentionBatch, sequences: Tensor, scale: float,
                    sliding_window: int | None) -> Tensor:
    context_lens = batch.context_lens_S[sequences]
    longest = int(context_lens.max())
    num_blocks = -(-longest // cache.shape[2])
    blocks_SM = batch.block_tables_SM[sequences, :num_blocks].long().to(q_SHd.device)
    keys, values = (cache[i][blocks_SM].flatten(1, 2).transpose(1, 2) for i in (0, 1))
    lens_S1 = context_lens.to(q_SHd.device).unsqueeze(1)
    key_positions = torch.arange(keys.shape[2], device=q_SHd.device)
    visible_SP = key_positions < lens_S1
    if sliding_window is not None:
        visible_SP &= key_positions >= lens_S1 - sliding_window
    out = functional.scaled_dot_product_attention(q_SHd.unsqueeze(2), keys, values, visible_SP[:, None, None, :],
                                                  scale=scale, enable_gqa=True)
    return out.squeeze(2)


def _attend_chunk(q_nHd: Tensor, cache: Tensor, batch: AttentionBatch, sequence: int, scale: float,
                  sliding_window: int | None) -> Tensor:
    num_rows, context_len = q_nHd.shape[0], int(batch.context_lens_S[sequence])
    blocks = batch.block_tables_SM[sequence, :-(-context_len // cache.shape[2])].long().to(q_nHd.device)
    keys, values = (cache[i][blocks].flatten(0, 1)[:context_len].transpose(0, 1).unsqueeze(0) for i in (0, 1))
    query = q_nHd.transpose(0, 1).unsqueeze(0)
    is_whole = num_rows == context_len and (sliding_window is None or sliding_window >= context_len)
    mask = None
    if not is_whole:
        positions_n1 = torch.arange(context_len - num_rows, context_len, device=q_nHd.device).unsqueeze(1)
        key_positions = torch.arange(context_len, device=q_nHd.device)
        mask = key_positions <= positions_n1
        if sliding_window is not None:
            mask &= key_positions > positions_n1 - sliding_window
    out = functional.scaled_dot_product_attention(query, keys, values, mask, is_causal=is_whole, scale=scale,
                                                  enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)
