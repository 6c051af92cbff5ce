"""What the sequences of one shard own of its caches: KV blocks, and slots for states where the model keeps any. Pure.

Both hang on the same names, the hashes of all tokens up to a place: a sequence starts with what others have left there,
and leaves what it fills.
"""

from __future__ import annotations

from collections.abc import Iterator

from serving.config import SchedulerConfig
from serving.engine.block_manager import BlockManager
from serving.engine.block_names import BlockNames
from serving.engine.request import Request
from serving.engine.state_slots import (
    SLOTS_OF_A_SEQUENCE,
    SLOTS_WITH_SNAPSHOT,
    PlannedSlots,
    StateSlots,
    snapshot_positions,
)


class SequenceCaches:
    def __init__(self, config: SchedulerConfig, num_blocks: int, num_state_slots: int) -> None:
        """`num_state_slots`: of models with layers that keep a state."""
        if 0 < num_state_slots < SLOTS_WITH_SNAPSHOT:
            raise ValueError(f"num_state_slots={num_state_slots}: a sequence that starts from a snapshot needs "
                             f"{SLOTS_WITH_SNAPSHOT}; give more, or 0 for a model without states")
        self.states = StateSlots(num_state_slots)
        self.blocks = BlockManager(num_blocks, config.block_size, config.prefix_caching, self.states.forget)
        self._config = config
        self._names = BlockNames(config.block_size)

    def reusable_names(self, request: Request) -> Iterator[bytes]:
        """Yield the names of the blocks that a cached prefix may replace, were they all here: none when the prompt's
        log-probabilities are wanted, which only computing gives."""
        if not self._config.prefix_caching or request.wants_prompt_logprobs:
            return iter(())
        return self._names.of(request)

    def num_lacking_blocks(self, request: Request, num_spare: int) -> int:
        """Return the blocks that must be given back before a waiting request can start; 0 or less: none."""
        prefix, _ = self._cached_prefix(request)
        num_new = self.blocks.num_blocks_for(request.num_tokens) - len(prefix)
        return self.blocks.num_lacking(num_new, prefix, num_spare)

    @property
    def has_state_room(self) -> bool:
        return not self.states.num_slots or self.states.num_free >= SLOTS_OF_A_SEQUENCE

    def start(self, request: Request, num_spare: int) -> bool:
        """Give a waiting request the blocks of its known tokens, cached ones first, and its slots. False: it does not
        fit, with `num_spare` blocks left over."""
        prefix, num_shared = self._cached_prefix(request)
        num_new = self.blocks.num_blocks_for(request.num_tokens) - len(prefix)
        block_table = self.blocks.allocate(num_new, prefix, num_spare)
        if block_table is None:
            return False
        if not self.states.start(request.request_id, request.block_hashes[len(prefix) - 1] if prefix else None):
            self.blocks.free(block_table)
            return False
        request.block_table = tuple(block_table)
        request.snapshot_positions = self._positions_worth_keeping(request, num_shared)
        request.num_computed_tokens = len(prefix) * self._config.block_size
        return True

    def has_block_of_next_token(self, request: Request) -> bool:
        """Return whether a running request has the blocks of all its tokens, given those that are free."""
        while len(request.block_table) * self._config.block_size < request.num_tokens:
            block_table = self.blocks.allocate(1)
            if block_table is None:
                return False
            request.block_table += tuple(block_table)
        return True

    def slots_of_step(self, request: Request, start: int, end: int) -> PlannedSlots:
        """Return the slots of a step that computes positions start to end - 1."""
        on_the_way = [position for position in request.snapshot_positions if start < position < end]
        return self.states.plan(request.request_id, on_the_way, lambda position: self._names.at(request, position))

    def commit(self, request: Request, num_computed_before: int) -> None:
        """Let others share what a step that succeeded has filled."""
        if self._config.prefix_caching:
            self._publish(request, num_computed_before)
        if self.states.num_slots:
            self._commit_state(request)

    def release(self, request: Request) -> None:
        self.blocks.free(request.block_table)
        request.block_table = ()
        self.states.release(request.request_id)

    def _cached_prefix(self, request: Request) -> tuple[list[int], int]:
        """Return the blocks that it can start with, and how many tokens' blocks are cached at all."""
        prefix = self.blocks.cached_prefix(self.reusable_names(request))
        num_reusable = self.states.num_reusable(request.block_hashes[:len(prefix)])
        return prefix[:num_reusable], len(prefix) * self._config.block_size

    def _positions_worth_keeping(self, request: Request, num_shared: int) -> tuple[int, ...]:
        """`num_shared`: tokens whose blocks are cached, with or without a snapshot at their end."""
        if not self.states.num_slots or not self._config.prefix_caching:
            return ()
        submission = request.submission
        return snapshot_positions(submission.prompt_token_ids, submission.stop_token_ids, self._config.block_size,
                                  self._config.snapshot_interval_tokens, num_shared)

    def _publish(self, request: Request, num_computed_before: int) -> None:
        size = self._config.block_size
        num_full_before, num_full = num_computed_before // size, request.num_computed_tokens // size
        if num_full > num_full_before:
            hashes = self._names.first(request, num_full)
            for index in range(num_full_before, num_full):
                self.blocks.publish(request.block_table[index], hashes[index])

    def _commit_state(self, request: Request) -> None:
        """A state at the end of a full block is kept where the prompt wants it, and all along the output."""
        position = request.num_computed_tokens
        is_output = position > len(request.submission.prompt_token_ids)
        keeps = self._config.prefix_caching and position % self._config.block_size == 0 and (
            is_output or position in request.snapshot_positions)
        self.states.commit(request.request_id, lambda at: self._names.at(request, at), position, keeps, is_output)
