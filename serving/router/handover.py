"""Empties members that leave. What is on them is made ready on another first, and goes on there a few steps later.

A warm-up is a sequence as it is, with one token more: when it has ended, its blocks are in the other's prefix cache.
Those that the other has not it takes from the member that leaves, or computes, whichever is done sooner.
Then the sequence itself follows, and only what it has produced meanwhile has to be computed. Where a warm-up fails the
sequence stays until its member is gone, and is computed again then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from serving.engine.request import FinishReason, Submission, TokenEvent
from serving.errors import ServingError
from serving.router.shard_links import ShardLinks

MAX_WARM_UPS = 4        # of one router at once: they take turns with what runs where they are


@dataclass(frozen=True, slots=True)
class Moving:
    """A sequence as it is now: what ShardLinks.choose() and send() take."""

    submission: Submission
    hashes: tuple[int, ...]
    may_shorten: bool


class Mover(Protocol):
    def moving(self, sequence_id: str) -> Moving:
        """Return an open sequence."""

    def move(self, sequence_id: str, shard_id: str, way: str) -> None:
        """Have a sequence go on there, and no longer where it is. Nothing to do for one that has ended or moved."""


class Handovers:
    """Owned by the service. All methods are called on one event loop."""

    def __init__(self, links: ShardLinks, mover: Mover, warms_up: bool) -> None:
        """`warms_up`: shards have prefix caches; else what moves is computed again in any case."""
        self._links = links
        self._mover = mover
        self._warms_up = warms_up
        self._warm_ups: dict[str, str] = {}     # warm-up's id -> sequence's
        self._stay: set[str] = set()            # sequences whose warm-up has failed

    def advance(self) -> None:
        """Begin as many as may run at once."""
        not_now = {*self._warm_ups, *self._warm_ups.values(), *self._stay}
        for sequence_id in self._links.on_leaving():
            if len(self._warm_ups) >= MAX_WARM_UPS:
                return
            if sequence_id not in not_now:
                self._begin(sequence_id)

    def event(self, event: TokenEvent) -> None:
        """Take up an event of a sequence that the service does not know."""
        if event.finish_reason is None or event.request_id not in self._warm_ups:
            return
        sequence_id = self._warm_ups.pop(event.request_id)
        shard_id = self._links.take_back(event.request_id)
        if event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and shard_id is not None:
            self._mover.move(sequence_id, shard_id, way_of(event, self._mover.moving(sequence_id).submission))
        else:
            self._stay.add(sequence_id)
        self.advance()

    def lost(self, warm_up_id: str) -> None:
        """Forget a warm-up whose shard is gone; advance() may begin another."""
        self._warm_ups.pop(warm_up_id, None)

    def ended(self, sequence_id: str) -> None:
        """Take a sequence's warm-up out of its shard: it is not needed any more."""
        self._stay.discard(sequence_id)
        for warm_up_id in [name for name, warmed in self._warm_ups.items() if warmed == sequence_id]:
            del self._warm_ups[warm_up_id]
            self._links.remove(warm_up_id, (), is_over_in_shard=False)

    def _begin(self, sequence_id: str) -> None:
        moving = self._mover.moving(sequence_id)
        try:
            chosen = self._links.choose(moving.submission, moving.hashes, moving.may_shorten)
        except ServingError:        # the others have no room for it
            self._stay.add(sequence_id)
            return
        if chosen is None:
            return
        num_output = len(moving.submission.journal_token_ids)
        if not num_output or not self._warms_up:        # of the first nobody has seen anything
            self._mover.move(sequence_id, chosen.shard_id, "resubmitted")
            return
        warm_up_id = f"{sequence_id}-warm-up"
        self._warm_ups[warm_up_id] = sequence_id
        warm_up = replace(moving.submission, request_id=warm_up_id, max_tokens=num_output + 1, min_tokens=0,
                          source_shard_id=self._links.shard_of(sequence_id))
        self._links.send(warm_up, moving.hashes, chosen)


def way_of(warm_up: TokenEvent, sequence: Submission) -> str:
    """Return how most of a sequence has come to its new member, by the only event of its warm-up."""
    num_sent, num_cached = warm_up.num_received_tokens, warm_up.num_cached_tokens or 0
    num_known = len(sequence.prompt_token_ids) + len(sequence.journal_token_ids)
    ways = {"sent": num_sent, "cached": num_cached - num_sent, "computed": num_known - max(num_sent, num_cached)}
    return max(ways, key=lambda way: ways[way])
