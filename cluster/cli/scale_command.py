"""`moesaic scale`: asks until the pool has the shards that it is to have."""

from __future__ import annotations

import contextlib
import time
from typing import Protocol

from cluster.coordinator.client import CoordinatorUnavailableError
from cluster.coordinator.pool_scale import PoolScale

_POLL_S = 0.5


class ScaleClient(Protocol):
    def scale(self, pool: str, num: int, shard_id: str | None) -> PoolScale: ...


def scaled(client: ScaleClient, pool: str, num: int, shard_id: str | None, wait_s: float) -> PoolScale:
    """Ask, and look again until it is done or the time is over. Raises PlacementError, CoordinatorUnavailableError."""
    scale, until_s = client.scale(pool, num, shard_id), time.monotonic() + wait_s
    while not scale.is_done and time.monotonic() < until_s:
        time.sleep(_POLL_S)
        with contextlib.suppress(CoordinatorUnavailableError):
            scale = client.scale(pool, num, shard_id)
    return scale
