"""Divides a member's memory for sequences: KV blocks, and slots for the states of layers that keep one. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planner.memory_demand import DTYPE_BYTES, max_model_len, sequence_bytes
from model.args import ModelArgs
from model.memory import kv_block_bytes, state_slot_bytes
from serving.config import ServeConfig
from serving.engine.state_slots import SLOTS_WITH_SNAPSHOT


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Holds what a member gives its sequences."""

    num_blocks: int
    num_state_slots: int            # 0: no layer keeps a state


def divide_cache(args: ModelArgs, config: ServeConfig, cache_bytes: int) -> CacheSizes:
    """Divide so that as many sequences of `placement.context_tokens` as possible run at once.

    Never more blocks than all running sequences at full length could use; what is left then goes to snapshots.
    """
    dtype_bytes, block_size = DTYPE_BYTES[config.model.dtype], config.scheduler.block_size
    block_bytes, slot_bytes = kv_block_bytes(args, block_size, dtype_bytes), state_slot_bytes(args, dtype_bytes)
    most_blocks = config.scheduler.max_running_requests * -(-max_model_len(args, config) // block_size)
    if not slot_bytes:
        return CacheSizes(min(cache_bytes // block_bytes, most_blocks), 0)
    context_tokens = min(config.placement.context_tokens, max_model_len(args, config))
    num_sequences = max(1, cache_bytes // sequence_bytes(args, context_tokens, dtype_bytes))
    num_slots = SLOTS_WITH_SNAPSHOT * num_sequences
    num_blocks = min(max(0, cache_bytes - num_slots * slot_bytes) // block_bytes, most_blocks)
    return CacheSizes(num_blocks, max(num_slots, (cache_bytes - num_blocks * block_bytes) // slot_bytes))
