"""All links of one router to the members of the running epoch: which sequence is where, and where the next one goes."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from serving.config import SchedulerConfig
from serving.engine.engine import ShardLoad
from serving.engine.request import Submission, TokenEvent
from serving.engine.state_slots import snapshot_positions
from serving.errors import NotReadyError, ShardFailedError
from serving.link.client import ShardLinkClient, SubmissionQueue
from serving.link.epoch import Epoch
from serving.metrics import ShardMetrics
from serving.router.request_checks import LengthLimit, check_length, kv_cache_limit
from serving.router.shard_choice import (
    EXPECTED_OUTPUT_TOKENS,
    PrefixIndex,
    RoutedRequest,
    ShardSnapshot,
    block_hashes,
    choose_shard,
    snapshot_room,
)

logger = logging.getLogger(__name__)

CONNECT_WAIT_S = 30.0       # of set_epoch, for all members


class LinksOwner(Protocol):
    """Told on the event loop; must not raise."""

    def sequence_events(self, events: list[TokenEvent]) -> None: ...

    def sequences_lost(self, sequence_ids: list[str], error: ShardFailedError) -> None:
        """Their shard is gone; place() them again or fail them."""

    def links_settled(self) -> None:
        """Every member of a new epoch is connected, or has had its time to."""


@dataclass(slots=True)
class PlacedSequence:
    link: ShardLinkClient
    submission: Submission
    hashes: tuple[int, ...]         # of the prompt's blocks
    num_new_tokens: int = 0         # produced on this shard
    num_counted_tokens: int = 0     # of its open tokens, in the shard's sum

    @property
    def num_open_tokens(self) -> int:
        """Tokens that the shard probably still has to compute for it."""
        submission = self.submission
        num_known = len(submission.prompt_token_ids) + len(submission.journal_token_ids)
        return (0 if self.num_new_tokens else num_known) + expected_output_tokens(submission, self.num_new_tokens)


def expected_output_tokens(submission: Submission, num_new_tokens: int = 0) -> int:
    """Tokens that a sequence probably still has to draw, when it has drawn so many on its shard."""
    num_left = submission.max_tokens - len(submission.journal_token_ids) - num_new_tokens
    return max(1, min(num_left, EXPECTED_OUTPUT_TOKENS))


class ShardLinks:
    """Owned by the service. All methods are called on one event loop."""

    def __init__(self, router_id: str, window: int, scheduler: SchedulerConfig, clock: Callable[[], float],
                 owner: LinksOwner, metrics: ShardMetrics) -> None:
        self.epoch: Epoch | None = None
        self.is_settling = False            # a new epoch's members are connecting
        self._router_id = router_id
        self._window = window
        self._block_size = scheduler.block_size
        self._snapshot_interval_tokens = scheduler.snapshot_interval_tokens
        self._clock = clock
        self._owner = owner
        self._metrics = metrics
        self._links: dict[str, ShardLinkClient] = {}        # by shard id, in rank order
        self._placed: dict[str, PlacedSequence] = {}        # by sequence id
        self._num_open_tokens: Counter[str] = Counter()     # of the placed sequences, by shard id
        self._num_placed: Counter[str] = Counter()          # likewise
        self._shares: dict[str, float] = {}                 # of the requests, by shard id
        self._index = PrefixIndex()
        self._all_connected = asyncio.Event()

    async def set_epoch(self, epoch: Epoch, connect_wait_s: float = CONNECT_WAIT_S) -> None:
        """Leave the old epoch for a newer one. Returns when its members are connected, or had `connect_wait_s` to be.
        What was open is reported lost at once, and may be placed again when links_settled() is called. A newer revision
        of the same epoch only changes the shares of later requests."""
        if self.epoch is not None and epoch.number == self.epoch.number and epoch.revision > self.epoch.revision:
            self.epoch, self._shares = epoch, _shares_of(epoch)
            return
        if self.epoch is not None and epoch.number <= self.epoch.number:
            logger.info("old_epoch_ignored epoch=%d running=%d", epoch.number, self.epoch.number)
            return
        self.epoch, self.is_settling, self._shares = epoch, True, _shares_of(epoch)
        old, self._links = self._links, {member.shard_id: self._new_link(epoch, rank)
                                         for rank, member in enumerate(epoch.members)}
        self._forget_others(old)
        self._all_connected = all_connected = asyncio.Event()
        for link in self._links.values():
            link.start()
        self._lose(list(self._placed), ShardFailedError(f"epoch {epoch.number} has begun"))
        await asyncio.gather(*(link.close() for link in old.values()))
        with suppress(TimeoutError):
            async with asyncio.timeout(connect_wait_s):
                await all_connected.wait()
        if self.epoch is epoch:             # else a still newer one has come meanwhile, and settles itself
            self.is_settling = False
            self._owner.links_settled()

    async def close(self) -> None:
        links, self._links = self._links, {}
        await asyncio.gather(*(link.close() for link in links.values()))

    @property
    def is_ready(self) -> bool:
        return bool(self._links) and all(link.is_connected for link in self._links.values())

    @property
    def length_limit(self) -> LengthLimit | None:
        """Return the largest prompt + output that any connected member can hold; None when none is connected."""
        shards = self.snapshots()
        return self._length_limit(shards) if shards else None

    def _length_limit(self, shards: Sequence[ShardSnapshot]) -> LengthLimit:
        largest = max(shards, key=lambda shard: shard.max_request_tokens(self._block_size))
        return kv_cache_limit(largest.max_request_tokens(self._block_size),
                              largest.kv_blocks_total * largest.kv_block_bytes)

    def snapshots(self) -> tuple[ShardSnapshot, ...]:
        """Return the connected members, in rank order."""
        return tuple(
            ShardSnapshot(
                shard_id=shard_id, num_open_tokens=self._num_open_tokens[shard_id],
                num_foreign_sequences=max(0, link.load.num_sequences - self._num_placed[shard_id]),
                kv_blocks_free=link.load.kv_blocks_free, kv_blocks_total=link.load.kv_blocks_total,
                share=self._shares[shard_id], num_sequences=link.load.num_sequences,
                state_slots_free=link.load.state_slots_free,
                state_slots_total=link.load.state_slots_total,
                kv_block_bytes=link.load.kv_block_bytes)
            for shard_id, link in self._links.items() if link.is_connected and link.load is not None)

    def place(self, submission: Submission, hashes: tuple[int, ...], may_shorten: bool) -> None:
        """Send a sequence to the best shard. `may_shorten`: the client set no max_tokens, so a shard with a smaller KV
        cache may lower it. Raises NotReadyError without a shard, ContextLengthError when it fits into none."""
        shards = self.snapshots()
        if not shards:
            raise NotReadyError("no shard is connected", fix="try again; `moesaic status` shows the shards")
        num_prompt = len(submission.prompt_token_ids)
        num_known = num_prompt + len(submission.journal_token_ids)
        limit = self._length_limit(shards)
        num_output = expected_output_tokens(submission)
        at_least = num_prompt + submission.max_tokens
        if may_shorten:
            at_least = max(num_known + 1, min(num_known + num_output, limit.num_tokens))
        request = RoutedRequest(hashes, num_known, num_output, at_least)
        chosen = choose_shard(request, shards, self._index, self._block_size)
        if chosen is None:
            check_length(num_known if may_shorten else num_prompt, None if may_shorten else submission.max_tokens,
                         limit, "prompt")
            raise NotReadyError("no connected shard takes requests", fix="try again; `moesaic status` shows the shards")
        if may_shorten:
            room = chosen.max_request_tokens(self._block_size) - num_prompt
            submission = replace(submission, max_tokens=min(submission.max_tokens, room))
        link = self._links[chosen.shard_id]
        link.submit(submission)
        sequence = self._placed[submission.request_id] = PlacedSequence(link, submission, hashes)
        self._num_placed[chosen.shard_id] += 1
        self._count(sequence, sequence.num_open_tokens)
        self._index.record(chosen.shard_id, hashes, chosen.kv_blocks_total, chosen.snapshot_room,
                           lambda: self._kept_blocks(submission))

    def _kept_blocks(self, submission: Submission) -> list[int]:
        """Return the numbers of blocks of the prompt after which a shard keeps the state, if its layers have one."""
        positions = snapshot_positions(submission.prompt_token_ids, submission.stop_token_ids, self._block_size,
                                       self._snapshot_interval_tokens)
        return [position // self._block_size for position in positions]

    def remove(self, sequence_id: str, output_token_ids: Sequence[int], is_over_in_shard: bool) -> None:
        """Forget a sequence that has ended. Its shard is told unless it ended it, and keeps what it computed in its
        prefix cache: the next turn of a chat will find it there."""
        sequence = self._take_out(sequence_id)
        if sequence is None or sequence.link.load is None:
            return
        if not is_over_in_shard:
            sequence.link.cancel(sequence_id)
        hashes = sequence.hashes
        rest = sequence.submission.prompt_token_ids[len(hashes) * self._block_size:]
        known = (*rest, *output_token_ids[:-1])     # the last was drawn, not computed
        later = block_hashes(known, self._block_size, hashes[-1] if hashes else 0)
        load = sequence.link.load
        self._index.extend(sequence.link.member.shard_id, hashes, later, load.kv_blocks_total,
                           snapshot_room(load.state_slots_total, load.num_sequences))

    # LinkOwner

    def link_connected(self, link: ShardLinkClient) -> None:
        if self._is_current(link):
            self._metrics.joined(link.member)
            self._observe(link)
            if self.is_ready:
                self._all_connected.set()

    def link_events(self, link: ShardLinkClient, events: list[TokenEvent]) -> None:
        if not self._is_current(link):
            return
        self._observe(link)
        wanted = []
        for event in events:
            sequence = self._placed.get(event.request_id)
            if sequence is not None and sequence.link is link:      # else it was cancelled meanwhile
                sequence.num_new_tokens += len(event.token_ids)
                self._count(sequence, sequence.num_open_tokens)
                wanted.append(event)
        self._owner.sequence_events(wanted)

    def link_broken(self, link: ShardLinkClient, error: ShardFailedError) -> None:
        if self._is_current(link):
            self._lose([name for name, sequence in self._placed.items() if sequence.link is link], error)

    def _is_current(self, link: ShardLinkClient) -> bool:
        return self._links.get(link.member.shard_id) is link

    def _observe(self, link: ShardLinkClient) -> None:
        load: ShardLoad | None = link.load
        if load is None:
            return
        self._metrics.observe(link.member.shard_id, link.member.pool, load)

    def _lose(self, sequence_ids: list[str], error: ShardFailedError) -> None:
        for sequence_id in sequence_ids:
            self._take_out(sequence_id)
        if sequence_ids:
            self._owner.sequences_lost(sequence_ids, error)

    def _take_out(self, sequence_id: str) -> PlacedSequence | None:
        sequence = self._placed.pop(sequence_id, None)
        if sequence is not None:
            self._count(sequence, 0)
            self._num_placed[sequence.link.member.shard_id] -= 1
        return sequence

    def _count(self, sequence: PlacedSequence, num_tokens: int) -> None:
        """Keep the shard's sum of open tokens, so that choosing need not look at every sequence."""
        self._num_open_tokens[sequence.link.member.shard_id] += num_tokens - sequence.num_counted_tokens
        sequence.num_counted_tokens = num_tokens

    def _new_link(self, epoch: Epoch, rank: int) -> ShardLinkClient:
        def new_queue() -> SubmissionQueue:
            return SubmissionQueue(epoch.number, self._router_id, self._window, self._clock)
        return ShardLinkClient(epoch.members[rank], new_queue, epoch.number, self)

    def _forget_others(self, old: dict[str, ShardLinkClient]) -> None:
        """Drop what is known of members that are not in the new epoch."""
        self._index.keep_only(list(self._links))
        for shard_id, link in old.items():
            if shard_id not in self._links:
                self._metrics.forget(shard_id, link.member.pool)


def _shares_of(epoch: Epoch) -> dict[str, float]:
    return {member.shard_id: share.fraction for member, share in zip(epoch.members, epoch.shares, strict=True)}
