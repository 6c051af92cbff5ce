from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.planner.memory_demand import (
    MIN_CONTEXT_TOKENS,
    PROCESS_GROWTH_BYTES,
    exchange_bytes,
    max_model_len,
    memory_demand,
)
from model.args import LinearAttentionArgs, parse_model_args
from model.memory import PAIR_BYTES, kv_block_bytes, state_slot_bytes
from serving.config import ConfigError, parse_config

FIELDS: dict[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "vocab_size": 1000,
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 4096, "norm_topk_prob": True, "mlp_only_layers": [0]}
ARGS = parse_model_args(FIELDS)
YARN_ARGS = parse_model_args(FIELDS | {"max_position_embeddings": 512, "rope_scaling": {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}})


def config(**changes: object) -> dict[str, object]:
    return {"model": {"path": "x", **changes}, "pools": [{"replicas": 2}]}


def test_experts_are_counted_once_and_the_rest_on_every_member() -> None:
    demand = memory_demand(ARGS, parse_config(config()), 2)
    assert demand.num_slots == 3 * 8                                    # the dense layer has none
    assert demand.expert_bytes == 3 * 64 * 32 * 2
    assert memory_demand(ARGS, parse_config(config(dtype="float32")), 2).expert_bytes == 2 * demand.expert_bytes


def test_the_least_kv_cache_holds_a_sequence_of_moderate_length_or_what_the_pool_asks_for() -> None:
    token_bytes = 4 * 2 * 2 * 16 * 2                                    # layers, keys and values, heads, size, bytes
    assert memory_demand(ARGS, parse_config(config()), 2).kv_cache_bytes == MIN_CONTEXT_TOKENS * token_bytes
    short = parse_config(config(max_model_len=100))
    assert memory_demand(ARGS, short, 2).kv_cache_bytes == 112 * token_bytes        # whole blocks of 16
    asked = parse_config({**config(), "pools": [{"kv_cache": "5MB"}]})
    assert memory_demand(ARGS, asked, 2).kv_cache_bytes == 5_000_000


@pytest.mark.parametrize(("linear", "num_slots"), [((0, 1, 2), 3), ((), 0)])
def test_a_kv_cache_that_holds_no_sequence_is_refused_with_the_bytes(linear: tuple[int, ...], num_slots: int) -> None:
    args = replace(ARGS, linear_layers=linear, linear=LinearAttentionArgs(2, 4, 16, 16, 4) if linear else None)
    needed = kv_block_bytes(args, 16, 2) + num_slots * state_slot_bytes(args, 2)
    pools = [{"name": "large", "kv_cache": needed}, {"name": "small", "kv_cache": needed - 1}]
    asked = parse_config({**config(), "pools": pools})
    with pytest.raises(ConfigError, match=rf"pool small: kv_cache={needed - 1} bytes, but .* {needed}: 1 bytes are "
                                          rf"missing\. set the pool's kv_cache to {needed} or more"):
        memory_demand(args, asked, 2)
    assert memory_demand(args, parse_config({**config(), "pools": pools[:1]}), 2).kv_cache_bytes == needed


def test_more_members_can_send_more_rows_to_one() -> None:
    few, many = (memory_demand(ARGS, parse_config(config()), members).buffer_bytes for members in (2, 8))
    assert many > few


def test_cpu_members_keep_rings_with_each_other_and_the_rows_of_small_steps() -> None:
    def exchanged(num_members: int, **changes: object) -> int:
        return exchange_bytes(ARGS, parse_config({**config(), **changes}), num_members)
    gathered = 4 * 256 * 2 * 64 * 2             # kinds of rows, rows, experts per token, hidden size, bytes
    assert exchanged(3) == 2 * PAIR_BYTES + gathered
    assert exchanged(3, scheduler={"max_batch_tokens": 16, "max_running_requests": 4}) == \
        2 * PAIR_BYTES + gathered * 48 // 256
    assert exchanged(1) == exchanged(3, group={"backend": "gloo"}) == exchanged(3, pools=[{"device": "cuda"}]) == 0
    assert exchanged(3, pools=[{"device": "cuda"}, {"name": "cpu"}]) == exchanged(3)


def test_loading_counts_where_the_vocabulary_is_large_and_batches_are_small() -> None:
    large = replace(ARGS, vocab_size=1_000_000)
    small = {**config(), "scheduler": {"max_batch_tokens": 1, "max_running_requests": 1}}
    table_bytes = 1_000_000 * 64 * 2
    assert memory_demand(large, parse_config(small), 1).buffer_bytes == table_bytes + PROCESS_GROWTH_BYTES
    wider = parse_config({**small, "model": {"path": "x", "dtype": "float32"}})     # converted: 2 + 4 bytes
    assert memory_demand(large, wider, 1).buffer_bytes == 3 * table_bytes + PROCESS_GROWTH_BYTES


def test_the_context_is_never_longer_than_the_checkpoints() -> None:
    assert max_model_len(ARGS, parse_config(config())) == 4096
    assert max_model_len(ARGS, parse_config(config(max_model_len=100))) == 100
    assert max_model_len(YARN_ARGS, parse_config(config())) == 2048
    assert max_model_len(YARN_ARGS, parse_config(config(max_model_len=2048))) == 2048
    with pytest.raises(ConfigError, match=r"max_model_len=10000 .* 4096 positions\. set it to 4096 or less"):
        max_model_len(ARGS, parse_config(config(max_model_len=10_000)))
