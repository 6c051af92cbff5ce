"""A shard's weights and KV cache, for one placement. Everything here runs on the shard's model thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.device_facts import return_free_memory, used_memory_bytes
from cluster.memory_demand import DTYPE_BYTES, PROCESS_GROWTH_BYTES, buffer_bytes, max_model_len, min_kv_cache_bytes
from cluster.process_group import ProcessGroup
from model.args import ModelArgs
from model.decoder import Decoder
from model.dispatch import Dispatcher, LocalDispatcher
from model.dispatch_auto import AutoDispatcher
from model.errors import OutOfMemoryError
from model.kernels.protocol import Kernels
from model.memory import kv_block_bytes
from model.pace import Pace, work_clock_of
from model.placement import Placement
from model.runner import Runner
from model.weights import LoadReport, load_decoder
from serving.config import PoolConfig, ServeConfig
from serving.epoch import Member

logger = logging.getLogger(__name__)

# Without a memory_budget the KV cache takes this part of what the weights leave; with one, all of it.
_DEFAULT_PART = 0.5


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What one placement made of the checkpoint on this member."""

    decoder: Decoder
    report: LoadReport
    placement: Placement
    rank: int
    num_expert_copies: int

    def holds(self, placement: Placement, rank: int) -> bool:
        """True when another epoch asks for the same experts, so that nothing need be loaded again."""
        layers = range(placement.num_layers)
        return placement.num_layers == self.placement.num_layers and all(
            placement.experts_of(layer, rank) == self.placement.experts_of(layer, self.rank) for layer in layers)


def load_model(folder: Path, args: ModelArgs, config: ServeConfig, kernels: Kernels, placement: Placement, rank: int,
               progress: Callable[[int, int], None]) -> LoadedModel:
    """Read this member's weights. Raises CheckpointError, TensorError."""
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    decoder, report = load_decoder(folder, args, dtype, kernels, placement, rank, progress)
    return LoadedModel(decoder, report, placement, rank, placement.num_experts_of(rank))


def num_kv_blocks(config: ServeConfig, pool: PoolConfig, args: ModelArgs, budget_bytes: int, device: str,
                  num_members: int) -> int:
    """KV blocks that fit beside what the process takes now, weights included. Raises OutOfMemoryError for none.

    Never more than all running sequences at full length could use.
    """
    return_free_memory()        # the KV cache of the epoch before
    block_bytes = kv_block_bytes(args, config.scheduler.block_size, DTYPE_BYTES[config.model.dtype])
    buffers = buffer_bytes(args, config.scheduler, num_members, DTYPE_BYTES[config.model.dtype])
    used = used_memory_bytes(device)
    left = budget_bytes - used - buffers
    # The process has grown since the plan was made, by pages of libraries above all: that part of the buffers is used.
    left = max(left, min(min_kv_cache_bytes(args, config), left + PROCESS_GROWTH_BYTES))
    wanted = pool.kv_cache or (left if pool.memory_budget else int(left * _DEFAULT_PART))
    num_useful = config.scheduler.max_running_requests * -(-max_model_len(args, config) // config.scheduler.block_size)
    num_blocks = min(wanted // block_bytes, num_useful)
    if num_blocks < 1 or wanted > left:
        raise OutOfMemoryError(
            f"budget {budget_bytes} bytes - process with its weights {used} - buffers {buffers} leaves {left} bytes "
            f"for the KV cache, which needs {max(block_bytes, pool.kv_cache or 0)}",
            fix="raise the pool's memory_budget, or lower its kv_cache or scheduler.max_batch_tokens")
    logger.info("kv_cache_sized blocks=%d bytes=%d used=%d budget=%d", num_blocks, num_blocks * block_bytes, used,
                budget_bytes)
    return num_blocks


def new_pace(member: Member, kernels: Kernels) -> Pace | None:
    """One for a member that emulates a speed; its runner and its dispatchers keep it."""
    speed = member.profile.emulated_speed if member.profile else None
    return None if speed is None else Pace(speed, work_clock_of(kernels.device, member.facts.num_threads))


def new_dispatcher(kernels: Kernels, placement: Placement, group: ProcessGroup, config: ServeConfig,
                   pace: Pace | None) -> Dispatcher:
    if group.num_members == 1:
        return LocalDispatcher(kernels, placement)
    dispatcher = AutoDispatcher(kernels, placement, group.rank, group.group, config.group.dispatch,
                                config.group.gather_max_rows)
    if pace is not None:
        dispatcher.keep_pace(pace)
    return dispatcher


def new_runner(model: LoadedModel, dispatcher: Dispatcher, num_blocks: int, block_size: int,
               pace: Pace | None) -> Runner:
    began_s = time.perf_counter()
    runner = Runner(model.decoder, dispatcher, num_blocks, block_size, pace)
    logger.info("runner_made num_blocks=%d took_s=%.2f", num_blocks, time.perf_counter() - began_s)
    return runner
