"""The memory that a checkpoint and a config ask of a member. Pure: read before anything is loaded."""

from __future__ import annotations

from cluster.planner.memory_plan import MemoryDemand
from model.args import ModelArgs
from model.kernels.limits import MAX_GATHERED_ROWS
from model.memory import PAIR_BYTES, expert_bytes, kv_block_bytes, shared_bytes, state_slot_bytes
from serving.config import ConfigError, ServeConfig
from serving.engine.state_slots import SLOTS_WITH_SNAPSHOT

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
MIN_CONTEXT_TOKENS = 2048       # a member that cannot cache so many (or the model's whole context) is no use
PROCESS_GROWTH_BYTES = 64 << 20     # stacks and arenas of threads, gRPC, the process group, what output formats need


def memory_demand(args: ModelArgs, config: ServeConfig, num_members: int) -> MemoryDemand:
    dtype_bytes = DTYPE_BYTES[config.model.dtype]
    return MemoryDemand(
        num_moe_layers=args.num_moe_layers, num_experts=args.num_experts,
        expert_bytes=expert_bytes(args, dtype_bytes), shared_bytes=shared_bytes(args, dtype_bytes),
        kv_cache_bytes=min_kv_cache_bytes(args, config),
        buffer_bytes=buffer_bytes(args, config, num_members))


def max_model_len(args: ModelArgs, config: ServeConfig) -> int:
    """Return the tokens of prompt and output together that one sequence may have. Raises ConfigError."""
    return config.model.context_length(args.context_limit)


def sequence_bytes(args: ModelArgs, context_tokens: int, dtype_bytes: int) -> int:
    """Return what one sequence takes: the keys and values of its context, and its state slots with a snapshot's."""
    slots_bytes = SLOTS_WITH_SNAPSHOT * state_slot_bytes(args, dtype_bytes)
    return context_tokens * kv_block_bytes(args, 1, dtype_bytes) + slots_bytes


def least_cache_bytes(args: ModelArgs, config: ServeConfig) -> int:
    """Return the fewest bytes with which anything runs: a KV block, and the slots of one sequence."""
    return sequence_bytes(args, config.scheduler.block_size, DTYPE_BYTES[config.model.dtype])


def min_kv_cache_bytes(args: ModelArgs, config: ServeConfig) -> int:
    """Return the least KV cache of a member: what the pools ask for, else one sequence of moderate length.

    Raises ConfigError for a pool whose kv_cache holds no sequence at all. Whoever plans a service asks here: `plan`,
    `doctor`, `up`, the coordinator, and the shard itself.
    """
    least = least_cache_bytes(args, config)
    asked = {pool.name: pool.kv_cache for pool in config.pools if pool.kv_cache is not None}
    for name, num_bytes in asked.items():
        if num_bytes < least:
            what = "a KV block and the state slots of one sequence take" if args.linear_layers else "one KV block takes"
            raise ConfigError(f"pool {name}: kv_cache={num_bytes} bytes, but {what} {least}: {least - num_bytes} bytes "
                              "are missing", fix=f"set the pool's kv_cache to {least} or more, or leave it out")
    if asked:
        return max(asked.values())
    block_size = config.scheduler.block_size
    num_blocks = -(-min(max_model_len(args, config), MIN_CONTEXT_TOKENS) // block_size)
    return sequence_bytes(args, num_blocks * block_size, DTYPE_BYTES[config.model.dtype])


def buffer_bytes(args: ModelArgs, config: ServeConfig, num_members: int) -> int:
    """Return the bytes above weights and KV cache: the larger of what a step and what loading needs, and growth.

    A step at its worst: every member computes a full batch and every row comes to one member's experts.
    Loading holds the largest tensor as it was read and, in another dtype than the checkpoint's, converted.
    """
    scheduler, dtype_bytes = config.scheduler, DTYPE_BYTES[config.model.dtype]
    num_rows = scheduler.max_batch_tokens * num_members * max(1, args.num_experts_per_tok)
    rows = num_rows * (3 * args.hidden_size + args.moe_intermediate_size) * dtype_bytes
    gated = args.num_heads if args.gated_attention else 0
    attention = 2 * (args.num_heads + args.num_kv_heads + gated) * args.head_dim
    linear = 0 if args.linear is None else 2 * args.linear.conv_width + 3 * args.linear.value_width
    width = 4 * args.hidden_size + max(attention, linear)
    mlp = 2 * max(args.intermediate_size, args.shared_expert_size, 1)
    local = scheduler.max_batch_tokens * (width + mlp) * dtype_bytes
    logits = scheduler.max_running_requests * args.vocab_size * 4 * 2
    stored_bytes = DTYPE_BYTES[args.dtype]
    loading = args.vocab_size * args.hidden_size * (stored_bytes + (dtype_bytes if stored_bytes != dtype_bytes else 0))
    return max(rows + local + logits, loading) + exchange_bytes(args, config, num_members) + PROCESS_GROWTH_BYTES


def exchange_bytes(args: ModelArgs, config: ServeConfig, num_members: int) -> int:
    """Return what a CPU member keeps to exchange rows by the transport; 0 where no member computes on a CPU.

    The rings that it shares with each other member, were all of them on its machine, and the rows of a gather in C:
    those that arrived, for experts, their outputs, and those that leave.
    """
    if num_members == 1 or config.group.backend == "gloo" or all(pool.device != "cpu" for pool in config.pools):
        return 0
    num_rows = min(config.scheduler.max_batch_tokens * num_members, MAX_GATHERED_ROWS)
    gathered = 4 * num_rows * max(1, args.num_experts_per_tok) * args.hidden_size * DTYPE_BYTES[config.model.dtype]
    return (num_members - 1) * PAIR_BYTES + gathered
