"""The link of a member, measured over what carries the group's rows while nothing else uses it."""

from __future__ import annotations

import logging
import time

import torch

from cluster.shard.process_group import ProcessGroup
from model.dispatch.collectives import Collectives
from model.pace import work_clock_of
from serving.link.epoch import Link

logger = logging.getLogger(__name__)

_SMALL_BYTES = 64           # to each other member
_LARGE_BYTES = 1 << 20
_SMALL_REPEATS, _LARGE_REPEATS = 8, 4       # fixed, because all members must make the same calls


def measure_link(group: ProcessGroup, device: torch.device) -> Link | None:
    """Measure with the others: every member calls this at the same place. Raises GroupError; None for one alone.

    The fastest of a few: a member that comes late makes a call longer for all, and some are late at first.
    """
    if group.num_members == 1:
        return None
    collectives = Collectives(group.rows, group.rank, group.num_members, device)
    began_s = time.perf_counter()
    small_s = _fastest_all_to_all(collectives, group, _SMALL_BYTES, _SMALL_REPEATS)
    large_s = _fastest_all_to_all(collectives, group, _LARGE_BYTES, _LARGE_REPEATS)
    num_bytes = (group.num_members - 1) * (_LARGE_BYTES - _SMALL_BYTES)
    link = Link(small_s, num_bytes / max(large_s - small_s, 0.1 * large_s))
    logger.info("link_measured rank=%d latency_ms=%.2f mb_per_s=%.0f took_s=%.3f", group.rank, small_s * 1e3,
                link.bytes_per_s / 1e6, time.perf_counter() - began_s)
    return link


def _fastest_all_to_all(collectives: Collectives, group: ProcessGroup, num_bytes: int, num_repeats: int) -> float:
    sent = torch.zeros(group.num_members, num_bytes, dtype=torch.uint8, device=collectives.wire_device)
    received = torch.empty_like(sent)
    one_each = [1] * group.num_members
    now = work_clock_of(collectives.wire_device, num_threads=2)     # time that passes, until it has arrived
    best_s = float("inf")
    for _ in range(num_repeats):
        began_s = now()
        collectives.all_to_all(received, sent, one_each, one_each)
        best_s = min(best_s, now() - began_s)
    return best_s
