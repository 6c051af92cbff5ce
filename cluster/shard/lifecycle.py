"""The states of one shard, and the moves between them that are legal."""

from __future__ import annotations

import logging

from cluster.coordinator.view import ShardState
from serving.errors import ServingError

logger = logging.getLogger(__name__)

_ENDS = frozenset({ShardState.WAITING, ShardState.BROKEN, ShardState.FAILED})       # of an epoch, at any moment of it
NEXT: dict[ShardState, frozenset[ShardState]] = {
    ShardState.STARTING: frozenset({ShardState.WAITING, ShardState.FAILED}),
    ShardState.WAITING: frozenset({ShardState.LOADING, ShardState.FAILED}),
    ShardState.LOADING: frozenset({ShardState.LOADED, *_ENDS}),
    ShardState.LOADED: frozenset({ShardState.JOINING, *_ENDS}),
    ShardState.JOINING: frozenset({ShardState.READY, *_ENDS}),
    ShardState.READY: _ENDS,
    ShardState.BROKEN: frozenset({ShardState.LOADING, ShardState.WAITING, ShardState.FAILED}),
    ShardState.FAILED: frozenset(),
}


class IllegalTransition(ServingError):
    pass


class ShardLifecycle:
    """Keeps the state of one shard."""

    def __init__(self, shard_id: str) -> None:
        self.shard_id = shard_id
        self.state = ShardState.STARTING

    def advance(self, to: ShardState, why: str) -> None:
        """Move to another state. Raises IllegalTransition."""
        if to not in NEXT[self.state]:
            allowed = ", ".join(sorted(NEXT[self.state])) or "none, it has ended"
            raise IllegalTransition(f"shard {self.shard_id}: {self.state} -> {to} ({why})",
                                    fix=f"allowed next: {allowed}")
        logger.info("shard_state shard_id=%s old=%s new=%s why=%s", self.shard_id, self.state, to, why)
        self.state = to
