"""What a member holds from one epoch to the next: engine, sequences, caches. Weights are ModelKeeper's.

It lasts as long as the member's role; one that begins or ceases to take requests begins anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from cluster.device.facts import trim_memory, used_memory_bytes
from cluster.planner.cache_plan import CacheSizes
from cluster.planner.memory_demand import DTYPE_BYTES, max_model_len
from cluster.shard.loaded_model import (
    LoadedModel,
    cache_sizes,
    cache_sizes_beside,
    new_pace,
    new_runner,
    read_grammars,
)
from model.caches import SequenceCaches
from model.memory import expert_bytes, kv_block_bytes, state_slot_bytes
from model.pace import Pace
from model.runner import Runner
from serving.config import PoolConfig, ServeConfig
from serving.engine.engine import Engine, Executor
from serving.engine.prefill_budget import PrefillBudget
from serving.engine.request import TokenEvent
from serving.engine.scheduler import Scheduler
from serving.link.epoch import Epoch

logger = logging.getLogger(__name__)

GROW_FROM = 1.25        # times its blocks: a cache that could be so large is enlarged, which takes a copy of it


@dataclass(slots=True)
class HeldEngine:
    """Made by `hold`. `engine`: from the first group on."""

    model: LoadedModel              # as it was when this was made
    config: ServeConfig
    sizes: CacheSizes
    pace: Pace
    process_bytes: int              # that the process took beside weights, before it had caches
    runner: Runner                  # the same through all groups, and so are its caches
    engine: Engine | None = None

    @property
    def caches(self) -> SequenceCaches:
        return self.runner.caches

    @property
    def block_bytes(self) -> int:
        return kv_block_bytes(self.model.decoder.args, self.config.scheduler.block_size, self._dtype_bytes)

    @property
    def slot_bytes(self) -> int:
        return state_slot_bytes(self.model.decoder.args, self._dtype_bytes)

    @property
    def _dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.config.model.dtype]

    def enter(self, epoch_number: int, executor: Executor, ring_peers: Callable[[int], Awaitable[None]],
              deliver: Callable[[str, int, list[TokenEvent]], None]) -> Engine:
        """Return the engine, in that epoch: with the sequences of the one before, if there was one."""
        if self.engine is None:
            self.engine = Engine(self._new_scheduler(), executor, epoch_number, time.monotonic, ring_peers, deliver)
        else:
            self.engine.change_epoch(epoch_number, executor, ring_peers)
        return self.engine

    def blocks_in(self, pool: PoolConfig, epoch: Epoch, rank: int) -> int:
        """Return the KV blocks that fit beside the experts which that epoch gives this member, by what the process took
        before it had caches. States keep their slots. Raises OutOfMemoryError."""
        if not self.sizes.num_blocks:       # it holds experts only
            return 0
        decoder = self.model.decoder
        num_held = sum(experts.weights.num_experts for experts in decoder.experts)      # revisions change them
        more_experts = epoch.placement.num_experts_of(rank) - num_held
        used_bytes = (self.process_bytes + decoder.weights_bytes
                      + more_experts * expert_bytes(decoder.args, self._dtype_bytes))
        sizes = cache_sizes_beside(used_bytes, self.config, pool, self.model,
                                   epoch.members[rank].facts.memory_budget_bytes, len(epoch.members))
        more_slots = sizes.num_state_slots - self.sizes.num_state_slots
        return max(1, sizes.num_blocks + more_slots * self.slot_bytes // self.block_bytes)

    def resize(self, num_blocks: int) -> None:
        """Go on with so many KV blocks, while the engine does not run. On the model thread."""
        began_s = time.perf_counter()
        self.caches.resize(num_blocks, self.engine.resize(num_blocks) if self.engine else {})
        trim_memory()
        logger.info("kv_cache_resized before=%d num_blocks=%d took_s=%.3f", self.sizes.num_blocks, num_blocks,
                    time.perf_counter() - began_s)
        self.sizes = replace(self.sizes, num_blocks=num_blocks)

    def _new_scheduler(self) -> Scheduler:
        max_tokens = max_model_len(self.model.decoder.args, self.config)
        scheduler = Scheduler(self.config.scheduler, self.sizes.num_blocks, max_tokens, self.sizes.num_state_slots,
                              slot_bytes=self.slot_bytes, block_bytes=self.block_bytes)
        if self.config.autoscaling is not None:
            scheduler.prefill_budget = PrefillBudget(self.config.autoscaling.itl_slo_s)
        return scheduler


def hold(config: ServeConfig, pool: PoolConfig, model: LoadedModel, epoch: Epoch, rank: int) -> HeldEngine:
    """Size and make the caches of a member whose weights are loaded, before others wait for it in a group. On the model
    thread. Raises OutOfMemoryError."""
    member = epoch.members[rank]
    grammars = read_grammars(model)         # before the caches take what is left
    sizes = cache_sizes(config, pool, model, member.facts.memory_budget_bytes, len(epoch.members))
    process_bytes = used_memory_bytes(str(model.decoder.kernels.device)) - model.decoder.weights_bytes
    pace = new_pace(member, model.decoder.kernels)
    runner = new_runner(model, sizes, config.scheduler.block_size, pace)
    runner.grammars = grammars              # None: requests may ask for free text only
    return HeldEngine(model, config, sizes, pace, process_bytes, runner)
