"""A shard's weights and KV cache, for one placement. Everything here runs on the shard's model thread."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.device.facts import return_free_memory, used_memory_bytes
from cluster.planner.cache_plan import CacheSizes, divide_cache
from cluster.planner.memory_demand import (
    PROCESS_GROWTH_BYTES,
    buffer_bytes,
    least_cache_bytes,
    min_kv_cache_bytes,
)
from cluster.shard.process_group import ProcessGroup
from model.dispatch.auto import AutoDispatcher
from model.dispatch.dispatcher import Dispatcher, LocalDispatcher
from model.dispatch.exchange import RowExchange
from model.errors import OutOfMemoryError
from model.expert_host import MemberModel
from model.grammar import GrammarMasks, GrammarTokenizer
from model.host_threads import HostThreads
from model.kernels.protocol import Kernels
from model.pace import UNTIMED, FileTurns, Pace, TimedPace, work_clock_of
from model.placement import Placement
from model.runner import Runner
from model.weights import Progress, WeightLoader
from serving.config import PoolConfig, ServeConfig
from serving.errors import ServingError
from serving.link.epoch import Epoch, Member
from serving.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Without a memory_budget the KV cache takes this part of what the weights leave; with one, all of it.
_DEFAULT_PART = 0.5
_TURNS_NAME = "moesaic-emulated-{user}.lock"      # of this machine's members with an emulated speed


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Holds what a placement made of the checkpoint on this member. `loader` read it, and reads what another adds."""

    decoder: MemberModel
    loader: WeightLoader
    placement: Placement
    rank: int
    takes_requests: bool
    num_expert_copies: int

    def placed(self, placement: Placement, rank: int) -> LoadedModel:
        """Return it as it is when its experts have been exchanged for those of another placement."""
        return replace(self, placement=placement, rank=rank, num_expert_copies=placement.num_experts_of(rank))

    @property
    def change_reserve_bytes(self) -> int:
        """Return the bytes by which the experts of any one layer can exist twice while the placement changes."""
        return max((experts.weights.nbytes for experts in self.decoder.experts), default=0)


def load_model(loader: WeightLoader, epoch: Epoch, rank: int, progress: Progress) -> LoadedModel:
    """Read this member's weights. Raises CheckpointError, TensorError."""
    placement, takes_requests = epoch.placement, epoch.takes_requests(rank)
    decoder: MemberModel
    if takes_requests:
        decoder, _ = loader.load_decoder(placement, rank, progress)
    else:
        decoder, _ = loader.load_expert_host(placement, rank, progress)
    return LoadedModel(decoder, loader, placement, rank, takes_requests, placement.num_experts_of(rank))


def cache_sizes(config: ServeConfig, pool: PoolConfig, model: LoadedModel, budget_bytes: int,
                num_members: int) -> CacheSizes:
    """Return the KV blocks and state slots that fit beside what the process takes now, weights included.

    None for a member that takes no requests. Raises OutOfMemoryError when not one block fits, or not one sequence's
    state slots.
    """
    return_free_memory()        # the KV cache of the epoch before
    used = used_memory_bytes(str(model.decoder.kernels.device))
    return cache_sizes_beside(used, config, pool, model, budget_bytes, num_members)


def cache_sizes_beside(used: int, config: ServeConfig, pool: PoolConfig, model: LoadedModel, budget_bytes: int,
                       num_members: int) -> CacheSizes:
    """Return the same beside `used` bytes. Raises OutOfMemoryError."""
    if not model.takes_requests:
        return CacheSizes(0, 0)
    args = model.decoder.args
    buffers = buffer_bytes(args, config, num_members)
    left = budget_bytes - used - buffers
    least = min_kv_cache_bytes(args, config)
    # The process has grown since the plan was made, by pages of libraries above all: that part of the buffers is used.
    left = max(left, min(least, left + PROCESS_GROWTH_BYTES))
    # Changing the placement comes after serving: where the memory is that short, it is refused.
    reserve = model.change_reserve_bytes if num_members > 1 else 0
    left = max(left - reserve, min(least, left))
    needed = least_cache_bytes(args, config)
    wanted = pool.kv_cache or (left if pool.memory_budget else max(int(left * _DEFAULT_PART), min(needed, left)))
    lacking = max(wanted, needed, least if left < needed else 0) - left
    if lacking > 0:
        raise OutOfMemoryError(
            f"budget {budget_bytes} bytes - process with its weights {used} - buffers {buffers} leaves {left} bytes "
            f"for the KV cache and states, which need {left + lacking}: {lacking} bytes are missing",
            fix="raise the pool's memory_budget, or lower its kv_cache or scheduler.max_batch_tokens")
    sizes = divide_cache(args, config, wanted)
    logger.info("caches_sized blocks=%d state_slots=%d bytes=%d used=%d budget=%d", sizes.num_blocks,
                sizes.num_state_slots, wanted, used, budget_bytes)
    return sizes


def new_pace(member: Member, kernels: Kernels) -> Pace:
    """Return the pace that a runner and its dispatchers share. An accelerator is not timed, as it would then have to be
    waited for at every collective: that is done only to emulate a speed."""
    speed = member.profile.emulated_speed if member.profile else None
    if speed is None:
        return TimedPace(1.0, time.perf_counter) if kernels.device.type == "cpu" else UNTIMED
    turns = FileTurns(Path(tempfile.gettempdir()) / _TURNS_NAME.format(user=os.getuid()))
    return TimedPace(speed, work_clock_of(kernels.device, kernels.num_threads), turns=turns)


def new_dispatcher(kernels: Kernels, placement: Placement, group: ProcessGroup, config: ServeConfig,
                   pace: Pace, threads: HostThreads | None = None) -> Dispatcher:
    if group.num_members == 1:
        return LocalDispatcher(kernels, placement, pace)
    exchange = RowExchange(kernels, placement, group.rank, group.rows, pace, threads)
    return AutoDispatcher(exchange, config.group.dispatch, config.group.gather_max_rows)


def read_grammars(model: LoadedModel) -> GrammarMasks | None:
    """Read the tokenizer, for what requests may ask of their form; None for a member that takes none, and where it
    cannot be used. No other Python code runs meanwhile: not for members of a group."""
    if not model.takes_requests:
        return None
    began_s = time.perf_counter()
    try:
        tokenizer = Tokenizer.from_dir(model.loader.checkpoint_dir)
        grammars = GrammarMasks(GrammarTokenizer(tokenizer.to_json(), tokenizer.eos_token_ids),
                                model.decoder.args.vocab_size)
    except (ServingError, ValueError) as error:         # who asks for free text is served all the same
        logger.warning("grammars_unavailable error=%s", error)
        return None
    logger.info("grammars_ready took_s=%.2f", time.perf_counter() - began_s)
    return grammars


def new_runner(model: LoadedModel, sizes: CacheSizes, block_size: int, pace: Pace) -> Runner:
    """Return a runner with its caches, in no group yet. To write zeros into all of them takes seconds."""
    began_s = time.perf_counter()
    runner = Runner(model.decoder, None, sizes.num_blocks, block_size, pace, sizes.num_state_slots)
    logger.info("runner_made num_blocks=%d took_s=%.2f", sizes.num_blocks, time.perf_counter() - began_s)
    return runner
