"""64k tokens of a hybrid: the same bits in other chunks, in the memory that was planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.kernels.packed_cpu_library import library_path
from model.memory import kv_block_bytes, state_slot_bytes

NUM_TOKENS = 65_536
NUM_BLOCKS = 2 * NUM_TOKENS // 4 + 8


@pytest.mark.skipif(library_path() is None, reason="no packed kernels for this CPU")
def test_64k_tokens_in_other_chunks(save_tiny: Callable[..., Path], engine_of: Any) -> None:
    from model.kernels.packed_cpu import PackedCpuKernels
    folder = save_tiny("qwen3_5_moe_text", hidden_size=16, num_hidden_layers=2, full_attention_interval=2,
                       num_attention_heads=1, num_key_value_heads=1, num_experts=2, num_experts_per_tok=1,
                       moe_intermediate_size=8,
                       shared_expert_intermediate_size=8, vocab_size=32, linear_num_value_heads=2,
                       max_position_embeddings=NUM_TOKENS)
    engine = engine_of(folder, torch.bfloat16, PackedCpuKernels(2), num_blocks=NUM_BLOCKS)
    caches = engine.runner.caches
    assert caches.nbytes == (NUM_BLOCKS * kv_block_bytes(engine.args, engine.block_size, 2)
                             + caches.num_state_slots * state_slot_bytes(engine.args, 2))
    generator = torch.Generator().manual_seed(0)
    token_ids = tuple(torch.randint(0, 32, (NUM_TOKENS,), generator=generator).tolist())
    first = engine.prefill_logits(token_ids, chunk=16_384)
    again = engine.prefill_logits(token_ids, chunk=10_007)
    assert torch.equal(again, first) and first.isfinite().all()
