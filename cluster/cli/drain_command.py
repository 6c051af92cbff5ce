"""`moesaic drain`: asks until the members may be stopped."""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import Protocol

from cluster.coordinator.client import CoordinatorUnavailableError
from cluster.coordinator.leaving import Drain

_POLL_S = 0.5


class DrainClient(Protocol):
    def drain(self, target: str, operation_id: str) -> Drain: ...


def drained(client: DrainClient, target: str, operation_id: str | None, wait_s: float) -> Drain:
    """Begin, and look again until it is done or the time is over. Raises PlacementError, CoordinatorUnavailableError.

    A coordinator that has restarted does not know of it: the same call begins it anew.
    """
    operation_id = operation_id or f"cli-{secrets.token_hex(4)}"
    drain, until_s = client.drain(target, operation_id), time.monotonic() + wait_s
    while not drain.is_done and time.monotonic() < until_s:
        time.sleep(_POLL_S)
        with contextlib.suppress(CoordinatorUnavailableError):
            drain = client.drain(target, operation_id)
    return drain
