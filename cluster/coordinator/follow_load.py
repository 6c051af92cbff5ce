"""Lets the sizes of the pools follow the load: decides by the autoscaler, begins what is decided, and says so."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from cluster.coordinator.autoscaling import Autoscaler, Heard
from cluster.coordinator.pool_scale import PoolScale
from cluster.coordinator.view import AutoscalerStatus
from cluster.planner.layer.error import PlacementError

logger = logging.getLogger(__name__)

DECIDE_S = 1.0              # between two looks


class Scalable(Protocol):
    """The part of the coordinator that is needed."""

    scaling: AutoscalerStatus | None

    def heard(self) -> Heard | None: ...
    async def scale(self, pool: str, num: int) -> PoolScale: ...
    async def sleep(self) -> None: ...


async def follow_load(service: Scalable, autoscaler: Autoscaler) -> None:
    """Decide again and again, until cancelled."""
    while True:
        await asyncio.sleep(DECIDE_S)
        try:
            await decide_once(service, autoscaler, time.monotonic(), time.time())
        except Exception:       # the next look may go better; the group goes on meanwhile
            logger.exception("autoscaling_failed")


async def decide_once(service: Scalable, autoscaler: Autoscaler, now_s: float, wall_s: float) -> None:
    """Decide, and begin what is decided. Without a group that runs, or sleeps, nothing is decided."""
    heard = service.heard()
    if heard is None:
        return
    decision = await asyncio.to_thread(autoscaler.decide, heard, now_s)
    refused: list[str] = []
    for change in decision.changes:
        try:
            await (service.scale(change.pool, change.after) if any(decision.wanted.values()) else service.sleep())
        except PlacementError as error:
            refused.append(f"pool {change.pool} is not changed to {change.after}: {error.message}")
        else:
            logger.info("pool_resized pool=%s before=%d after=%d backlog_s=%.2f why=%s", change.pool, change.before,
                        change.after, decision.backlog_s, change.why)
    why_not = "; ".join(refused)
    if why_not not in (service.scaling.waits_for if service.scaling is not None else ""):
        logger.warning("pool_not_resized why=%s", why_not)      # once, and not at every look
    service.scaling = autoscaler.status(decision, why_not, wall_s)
