"""All links of one router to the members of the running epoch: which sequence is where, and where the next one goes.

A link lasts as long as both processes do. An epoch brings members and takes them away; those that stay keep their link
and what is on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from serving.config import SchedulerConfig
from serving.engine.engine import ShardLoad
from serving.engine.request import Submission, TokenEvent
from serving.engine.state_slots import snapshot_positions
from serving.errors import ShardFailedError
from serving.link.client import ShardLinkClient, SubmissionQueue
from serving.link.epoch import Epoch, Member
from serving.link.security import PLAIN, LinkSecurity
from serving.metrics import MoveCause, ShardMetrics
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

SETTLE_S = 0.1      # from the first shard that connects until what waits is placed: others are about to connect too


class LinksOwner(Protocol):
    """Told on the event loop; must not raise."""

    def sequence_events(self, events: list[TokenEvent]) -> None: ...

    def sequences_lost(self, sequence_ids: list[str], cause: MoveCause, why: str) -> None:
        """They are on no shard any more; place() them again."""

    def shards_changed(self) -> None:
        """Others may take requests now than before: place() what waits."""


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
                 owner: LinksOwner, metrics: ShardMetrics, security: LinkSecurity = PLAIN) -> None:
        self.epoch: Epoch | None = None
        self._router_id = router_id
        self._window = window
        self._block_size = scheduler.block_size
        self._snapshot_interval_tokens = scheduler.snapshot_interval_tokens
        self._clock = clock
        self._owner = owner
        self._metrics = metrics
        self._security = security
        self._links: dict[str, ShardLinkClient] = {}        # by shard id, in rank order
        self._placed: dict[str, PlacedSequence] = {}        # by sequence id
        self._num_open_tokens: Counter[str] = Counter()     # of the placed sequences, by shard id
        self._num_placed: Counter[str] = Counter()          # likewise
        self._shares: dict[str, float] = {}                 # of new requests, by shard id
        self._leaving: frozenset[str] = frozenset()         # shard ids
        self._index = PrefixIndex()
        self._settle_timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()      # links to members that are gone

    def set_epoch(self, epoch: Epoch, leaving: Collection[str] = ()) -> None:
        """Go over to a newer epoch, or to newer shares and other `leaving` members of the same; ignore an older.

        What is on a member that is gone is reported lost at once. Those that leave, by their shard ids, keep what they
        have and get nothing new.
        """
        before = self.epoch
        if before is not None and (epoch.number, epoch.revision) < (before.number, before.revision):
            logger.info("old_epoch_ignored epoch=%d running=%d", epoch.number, before.number)
            return
        self.epoch, self._leaving, self._shares = epoch, frozenset(leaving), _shares_of(epoch, leaving)
        if before is None or epoch.number > before.number:
            self._change_members(epoch)
        self._tell_changed()

    def _change_members(self, epoch: Epoch) -> None:
        old, self._links = self._links, {}
        for member in epoch.members:
            stays = member.shard_id in old
            self._links[member.shard_id] = old.pop(member.shard_id) if stays else self._new_link(member)
        self._index.keep_only(list(self._links))
        for link in old.values():
            self._metrics.forget(link.member.shard_id, link.member.pool)
            closing = asyncio.create_task(link.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        logger.info("epoch_taken epoch=%d num_members=%d num_gone=%d", epoch.number, len(self._links), len(old))
        self._lose([name for name, sequence in self._placed.items() if sequence.link.member.shard_id in old],
                   MoveCause.MEMBER_GONE, f"its shard is not in epoch {epoch.number}")

    async def close(self) -> None:
        links, self._links = self._links, {}
        if self._settle_timer is not None:
            self._settle_timer.cancel()
        await asyncio.gather(*(link.close() for link in links.values()), *self._closing)

    @property
    def is_ready(self) -> bool:
        """Return whether a sequence could be placed now."""
        return any(link.is_connected and self._shares[shard_id] > 0 for shard_id, link in self._links.items())

    @property
    def is_complete(self) -> bool:
        """Return whether everybody who is to take requests can."""
        return self.is_ready and all(link.is_connected or not self._shares[shard_id] > 0
                                     for shard_id, link in self._links.items())

    @property
    def length_limit(self) -> LengthLimit | None:
        """Return the largest prompt + output that any member can hold; None as long as one has yet to tell."""
        takers = [link for shard_id, link in self._links.items() if self._shares[shard_id] > 0]
        if not takers or any(link.load is None for link in takers):
            return None
        return self._length_limit([self._snapshot(link, link.load) for link in takers if link.load is not None])

    def _length_limit(self, shards: Sequence[ShardSnapshot]) -> LengthLimit:
        largest = max(shards, key=lambda shard: shard.max_request_tokens(self._block_size))
        return kv_cache_limit(largest.max_request_tokens(self._block_size),
                              largest.kv_blocks_total * largest.kv_block_bytes)

    def snapshots(self) -> tuple[ShardSnapshot, ...]:
        """Return the connected members that take requests, in rank order."""
        return tuple(self._snapshot(link, link.load) for shard_id, link in self._links.items()
                     if link.is_connected and link.load is not None and self._shares[shard_id] > 0)

    def _snapshot(self, link: ShardLinkClient, load: ShardLoad) -> ShardSnapshot:
        shard_id = link.member.shard_id
        return ShardSnapshot(
            shard_id=shard_id, num_open_tokens=self._num_open_tokens[shard_id],
            num_foreign_sequences=max(0, load.num_sequences - self._num_placed[shard_id]),
            kv_blocks_free=load.kv_blocks_free, kv_blocks_total=load.kv_blocks_total, share=self._shares[shard_id],
            num_sequences=load.num_sequences, state_slots_free=load.state_slots_free,
            state_slots_total=load.state_slots_total, kv_block_bytes=load.kv_block_bytes)

    def on_leaving(self) -> list[str]:
        """Return what is on members that leave, longest there first."""
        return [sequence_id for sequence_id in self._placed if self.is_on_leaving(sequence_id)]

    def shard_of(self, sequence_id: str) -> str:
        """Return the shard that a placed sequence is on."""
        return self._placed[sequence_id].link.member.shard_id

    def is_on_leaving(self, sequence_id: str) -> bool:
        sequence = self._placed.get(sequence_id)
        return sequence is not None and sequence.link.member.shard_id in self._leaving

    def choose(self, submission: Submission, hashes: tuple[int, ...], may_shorten: bool,
               only: str | None = None) -> ShardSnapshot | None:
        """Return the best shard for a sequence, or the one with the id `only`.

        None when it has to wait for one: shards_changed() will be called. `may_shorten`: the client set no max_tokens,
        so a shard with a smaller KV cache may lower it. Raises ContextLengthError when it fits into none,
        ShardFailedError when it did before it was lost.
        """
        shards = tuple(shard for shard in self.snapshots() if only is None or shard.shard_id == only)
        if not shards:
            return None
        num_prompt = len(submission.prompt_token_ids)
        num_known = num_prompt + len(submission.journal_token_ids)
        limit = self._length_limit(shards)
        num_output = expected_output_tokens(submission)
        at_least = num_prompt + submission.max_tokens
        if may_shorten:
            at_least = max(num_known + 1, min(num_known + num_output, limit.num_tokens))
        request = RoutedRequest(hashes, num_known, num_output, at_least)
        chosen = choose_shard(request, shards, self._index, self._block_size)
        if chosen is None and only is None and self.is_complete:    # else one that is away may have room
            _refuse(submission, limit, may_shorten)
        return chosen

    def place(self, submission: Submission, hashes: tuple[int, ...], may_shorten: bool) -> bool:
        """Send a sequence to the shard that choose() chooses. Return False when there is none now. Raises likewise."""
        chosen = self.choose(submission, hashes, may_shorten)
        if chosen is not None:
            self.send(submission, hashes, chosen)
        return chosen is not None

    def send(self, submission: Submission, hashes: tuple[int, ...], chosen: ShardSnapshot) -> None:
        """Send a sequence to a shard that can hold what it has, and draw as much more as there is room for."""
        room = chosen.max_request_tokens(self._block_size) - len(submission.prompt_token_ids)
        if submission.max_tokens > room:
            submission = replace(submission, max_tokens=room)
        link = self._links[chosen.shard_id]
        link.submit(submission)
        sequence = self._placed[submission.request_id] = PlacedSequence(link, submission, hashes)
        self._num_placed[chosen.shard_id] += 1
        self._count(sequence, sequence.num_open_tokens)
        self._index.record(chosen.shard_id, hashes, chosen.kv_blocks_total, chosen.snapshot_room,
                           lambda: self._kept_blocks(submission))

    def take_back(self, sequence_id: str) -> str | None:
        """Forget where a sequence is that its shard has ended, and return the shard: it may be placed again."""
        sequence = self._take_out(sequence_id)
        return None if sequence is None else sequence.link.member.shard_id

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
        if not self._is_current(link):
            return
        self._metrics.joined(link.member)
        self._observe(link)
        if self.is_complete:
            self._tell_changed()
        elif self._settle_timer is None:
            self._settle_timer = asyncio.get_running_loop().call_later(SETTLE_S, self._tell_changed)

    def link_events(self, link: ShardLinkClient, events: list[TokenEvent]) -> None:
        if not self._is_current(link):
            return
        self._observe(link)
        wanted = []
        for event in events:
            sequence = self._placed.get(event.request_id)
            if sequence is not None and sequence.link is link:      # else it was cancelled meanwhile
                sequence.num_new_tokens += len(event.token_ids)
                if (num_open := sequence.num_open_tokens) != sequence.num_counted_tokens:
                    self._count(sequence, num_open)
                wanted.append(event)
        self._owner.sequence_events(wanted)

    def link_broken(self, link: ShardLinkClient, error: ShardFailedError) -> None:
        if self._is_current(link):
            self._lose([name for name, sequence in self._placed.items() if sequence.link is link],
                       MoveCause.LINK_BROKEN, str(error))
            self._tell_changed()

    def _tell_changed(self) -> None:
        if self._settle_timer is not None:
            self._settle_timer.cancel()
            self._settle_timer = None
        self._owner.shards_changed()

    def _is_current(self, link: ShardLinkClient) -> bool:
        return self._links.get(link.member.shard_id) is link

    def _observe(self, link: ShardLinkClient) -> None:
        load: ShardLoad | None = link.load
        if load is None:
            return
        self._metrics.observe(link.member.shard_id, link.member.pool, load)

    def _lose(self, sequence_ids: list[str], cause: MoveCause, why: str) -> None:
        for sequence_id in sequence_ids:
            self._take_out(sequence_id)
        if sequence_ids:
            self._owner.sequences_lost(sequence_ids, cause, why)

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

    def _new_link(self, member: Member) -> ShardLinkClient:
        def new_queue() -> SubmissionQueue:
            return SubmissionQueue(member.shard_id, self._router_id, self._window, self._clock)
        link = ShardLinkClient(member, new_queue, self, security=self._security)
        link.start()
        return link


def _shares_of(epoch: Epoch, leaving: Collection[str]) -> dict[str, float]:
    return {member.shard_id: 0.0 if member.shard_id in leaving else share.fraction
            for member, share in zip(epoch.members, epoch.shares, strict=True)}


def _refuse(submission: Submission, limit: LengthLimit, may_shorten: bool) -> None:
    """Raise for a sequence that no shard can hold."""
    num_prompt, num_output = len(submission.prompt_token_ids), len(submission.journal_token_ids)
    if num_output:
        raise ShardFailedError(f"the shard that held this sequence of {num_prompt + num_output} tokens is gone, and "
                               f"{limit.reason}", fix="ask for fewer tokens")
    check_length(num_prompt, None if may_shorten else submission.max_tokens, limit, "prompt")
