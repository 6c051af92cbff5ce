from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.planner.cache_plan import CacheSizes, divide_cache
from cluster.planner.memory_demand import min_kv_cache_bytes, sequence_bytes
from model.args import ModelArgs, parse_model_args
from model.memory import kv_block_bytes, state_slot_bytes
from serving.config import ServeConfig, parse_config
from serving.engine.state_slots import SLOTS_WITH_SNAPSHOT

HYBRID = parse_model_args({"model_type": "qwen3_next", "num_hidden_layers": 4, "hidden_size": 64,
                           "max_position_embeddings": 4096, "num_experts": 4, "num_experts_per_tok": 2})
PLAIN = replace(HYBRID, linear_layers=(), linear=None)


def config(**scheduler: int) -> ServeConfig:
    return parse_config({"model": {"path": "x"}, "pools": [{}], "scheduler": scheduler,
                         "placement": {"context_tokens": 256}})


def used_bytes(args: ModelArgs, sizes: CacheSizes) -> int:
    return sizes.num_blocks * kv_block_bytes(args, 16, 2) + sizes.num_state_slots * state_slot_bytes(args, 2)


@pytest.mark.parametrize("num_sequences", [1, 2, 7, 50])
def test_as_many_sequences_run_as_there_is_memory_for(num_sequences: int) -> None:
    one = sequence_bytes(HYBRID, 256, 2)
    sizes = divide_cache(HYBRID, config(), num_sequences * one + one // 2)
    assert sizes.num_state_slots >= SLOTS_WITH_SNAPSHOT * num_sequences
    assert sizes.num_blocks >= num_sequences * 256 // 16
    assert used_bytes(HYBRID, sizes) <= num_sequences * one + one // 2


def test_the_least_cache_runs_one_sequence_of_moderate_length() -> None:
    sizes = divide_cache(HYBRID, config(), min_kv_cache_bytes(HYBRID, config()))
    assert sizes.num_state_slots >= SLOTS_WITH_SNAPSHOT and sizes.num_blocks >= 2048 // 16


def test_what_blocks_cannot_use_goes_to_snapshots() -> None:
    some = config(max_running_requests=1)
    one = sequence_bytes(HYBRID, 4096, 2)
    sizes = divide_cache(HYBRID, some, 40 * one)
    assert sizes.num_blocks == 4096 // 16 and sizes.num_state_slots > 100
    assert used_bytes(HYBRID, sizes) > 39 * one


def test_a_model_without_states_gets_blocks_only() -> None:
    block_bytes = kv_block_bytes(PLAIN, 16, 2)
    assert divide_cache(PLAIN, config(), 10 * block_bytes + 1) == CacheSizes(10, 0)
    assert divide_cache(PLAIN, config(max_running_requests=2), 10**12) == CacheSizes(2 * 4096 // 16, 0)
