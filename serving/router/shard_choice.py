"""Request + shard snapshots -> shard. Pure: the longest cached prefix is weighed against the work that already waits.

Both are tokens to compute until the request is done, its own included, over the shard's share of the requests: the plan
gives each member the share that fits its speed and memory, so all are done at the same time when open work stands as
the shares do. Because a request counts itself, a slow member is not given one more that everybody would then wait for:
equal requests are handed out so that the last member is done as early as possible (the rule of D'Hondt). The router
keeps its own approximate index of which prefixes it sent where, as the cache-aware policies of SGLang's router and the
vLLM production stack do: shards are never asked. Of a model whose layers keep states a prefix counts as far as the
shard has kept one, which it does at positions that the router knows too (engine/state_slots.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from serving.engine.state_slots import SLOTS_OF_A_SEQUENCE

EXPECTED_OUTPUT_TOKENS = 256    # of a sequence about which nothing better is known
MAX_INDEX_BLOCKS = 1 << 18      # per shard, however large its KV cache


@dataclass(frozen=True, slots=True)
class ShardSnapshot:
    """One member as the router sees it now."""

    shard_id: str
    num_open_tokens: int            # this router's own: tokens its open sequences still have to compute there
    num_foreign_sequences: int      # running or waiting there for other routers
    kv_blocks_free: int
    kv_blocks_total: int
    share: float                    # of the requests that it should have, relative to the others
    num_sequences: int = 0          # running or waiting there for anybody
    state_slots_free: int = 0
    state_slots_total: int = 0      # 0: no layer keeps a state
    kv_block_bytes: int = 0         # 0 when unknown

    @property
    def lacks_state_slots(self) -> bool:
        """Return True where one more sequence must wait until another has ended."""
        return self.state_slots_total > 0 and self.state_slots_free < SLOTS_OF_A_SEQUENCE

    @property
    def snapshot_room(self) -> int:
        """Return how many states it can keep beside those of sequences that run now, as far as is known."""
        return snapshot_room(self.state_slots_total, self.num_sequences)

    def max_request_tokens(self, block_size: int) -> int:
        """Largest prompt + output that can ever fit: the last token drawn needs no place in the KV cache."""
        return self.kv_blocks_total * block_size + 1 if self.kv_blocks_total else 0


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """Holds what the choice of a shard depends on."""

    block_hashes: tuple[int, ...]   # of all known tokens' full blocks
    num_tokens: int                 # known: prompt and journal
    num_output_tokens: int          # still to come, as expected; at least 1
    num_tokens_at_least: int        # a shard that cannot hold so many is no choice


def snapshot_room(num_slots: int, num_sequences: int) -> int:
    return max(0, num_slots - SLOTS_OF_A_SEQUENCE * num_sequences)


def block_hashes(token_ids: Sequence[int], block_size: int, parent: int = 0) -> tuple[int, ...]:
    """Return chained hashes of the full blocks: equal when the blocks and everything before them are equal. `parent`:
    the hash of the block before the first."""
    hashes = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = hash((parent, *token_ids[start:start + block_size]))
        hashes.append(parent)
    return tuple(hashes)


def no_blocks() -> Iterable[int]:
    return ()


class PrefixIndex:
    """Knows which prefixes each shard was sent: as many blocks as its KV cache has, the least recently used go.

    Likewise the blocks at whose end it has kept a state.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, OrderedDict[int, None]] = {}
        self._states: dict[str, OrderedDict[int, None]] = {}
        self._last: dict[str, Sequence[int]] = {}       # recorded, by shard id
        self._counted: dict[str, tuple[Sequence[int], int]] = {}    # likewise; what was asked last, and its count

    def record(self, shard_id: str, hashes: Sequence[int], capacity: int, num_states: int = 0,
               kept_blocks: Callable[[], Iterable[int]] = no_blocks) -> None:
        """Note that the shard has computed, or will, what the hashes stand for. `capacity`: its KV blocks.

        It keeps states, at most `num_states`, after so many blocks as `kept_blocks` says, and where the prefix parts
        from what it has."""
        if self._last.get(shard_id) is hashes:      # of another choice of the same request
            return
        self._last[shard_id] = hashes
        if num_states:
            counts = {*kept_blocks(), self.num_cached_blocks(shard_id, hashes)}
            self._keep_states(shard_id, [hashes[count - 1] for count in sorted(counts) if 0 < count <= len(hashes)],
                              num_states)
        self._touch(shard_id, hashes, capacity)

    def extend(self, shard_id: str, hashes: Sequence[int], later: Sequence[int], capacity: int,
               num_states: int = 0) -> None:
        """Note that the shard has computed `hashes` and then `later`, the blocks behind them, and has kept the state at
        their end."""
        if later:
            self._keep_states(shard_id, later[-1:], num_states)
        if self._last.get(shard_id) is not hashes:
            self._last[shard_id] = hashes
            self._touch(shard_id, (*hashes, *later), capacity)
        elif later:                     # the first ones were recorded last of all
            self._touch(shard_id, later, capacity)

    def _keep_states(self, shard_id: str, blocks: Sequence[int], num_states: int) -> None:
        states = self._states.setdefault(shard_id, OrderedDict())
        for block in blocks:
            states[block] = None
            states.move_to_end(block)
        while len(states) > num_states:
            states.popitem(last=False)

    def _touch(self, shard_id: str, hashes: Sequence[int], capacity: int) -> None:
        self._counted.pop(shard_id, None)
        blocks = self._blocks.setdefault(shard_id, OrderedDict())
        for block in reversed(hashes):      # the tail is forgotten first, as in the shard
            blocks[block] = None
            blocks.move_to_end(block)
        states = self._states.get(shard_id, OrderedDict())
        while len(blocks) > min(capacity, MAX_INDEX_BLOCKS):
            block, _ = blocks.popitem(last=False)
            states.pop(block, None)

    def num_reusable_blocks(self, shard_id: str, hashes: Sequence[int]) -> int:
        """Return how many blocks a shard that keeps states can skip: as many as end with a state."""
        count, states = self.num_cached_blocks(shard_id, hashes), self._states.get(shard_id, OrderedDict())
        while count and hashes[count - 1] not in states:
            count -= 1
        return count

    def num_cached_blocks(self, shard_id: str, hashes: Sequence[int]) -> int:
        blocks = self._blocks.get(shard_id)
        if blocks is None:
            return 0
        asked, count = self._counted.get(shard_id, ((), 0))
        if asked is not hashes:         # else: of another choice of the same request
            count = next((count for count, block in enumerate(hashes) if block not in blocks), len(hashes))
            self._counted[shard_id] = hashes, count
        return count

    def keep_only(self, shard_ids: Sequence[str]) -> None:
        """Forget the shards that are gone."""
        self._blocks = {shard_id: blocks for shard_id, blocks in self._blocks.items() if shard_id in shard_ids}
        self._states = {shard_id: states for shard_id, states in self._states.items() if shard_id in shard_ids}
        self._last, self._counted = {}, {}


def choose_shard(request: RoutedRequest, shards: Sequence[ShardSnapshot], index: PrefixIndex,
                 block_size: int) -> ShardSnapshot | None:
    """Return the shard that should be done first; among equals the earlier. None when none can hold the request."""
    able = [shard for shard in shards if shard.max_request_tokens(block_size) >= request.num_tokens_at_least
            and shard.kv_blocks_total and shard.share > 0]

    def cost(shard: ShardSnapshot) -> tuple[bool, float, int]:
        count = index.num_reusable_blocks if shard.state_slots_total else index.num_cached_blocks
        num_cached = min(count(shard.shard_id, request.block_hashes) * block_size, request.num_tokens - 1)
        num_uncached = request.num_tokens - num_cached
        num_waiting = shard.num_open_tokens + shard.num_foreign_sequences * EXPECTED_OUTPUT_TOKENS
        must_wait = shard.kv_blocks_free * block_size < num_uncached or shard.lacks_state_slots
        num_to_compute = num_waiting + num_uncached + request.num_output_tokens
        return must_wait, num_to_compute / shard.share, num_waiting

    return min(able, key=cost, default=None)
