"""Pools that have no shard, until a request comes: since when, and what is shown of it. Time is an argument."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from cluster.coordinator.group_size import GroupSize
from cluster.coordinator.view import GroupPhase, View


def asleep_since(before_s: float | None, size: GroupSize, phase: GroupPhase, wall_s: float) -> float | None:
    """Return since when, on the wall clock, the service sleeps, or wakes up from that; None: it does neither."""
    if size.is_asleep:
        return wall_s if before_s is None else before_s
    return None if phase is GroupPhase.READY else before_s


def with_sleep(view: View, since_s: float | None, size: GroupSize) -> View:
    """Return the view of a service that sleeps or wakes up: routers hold requests meanwhile."""
    if since_s is None:
        return view
    since = f"{datetime.fromtimestamp(since_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
    why = f"asleep since {since}, wakes on the first request" if size.is_asleep else \
        f"wakes up, was asleep since {since}; {view.why}"
    return replace(view, is_asleep=True, why=why)
