"""What is left when nobody asks any more: requests, blocks, and what processes hold beyond what they did at first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from benchmarks.local_group.footprint import Footprint
from benchmarks.local_group.group import LocalGroup
from cluster.coordinator.view import ClusterStatus

GROWTH_BYTES = 48 << 20         # of one process, beyond what it had when all had been asked once, and its KV cache,
                                # which becomes resident as its blocks are used
THREADS_SPARE = 8               # that begin when first needed: asyncio's and gRPC's pools, and who copies blocks
FILES_SPARE = 2                 # of one kind: connections that gRPC is about to close


def is_idle(status: ClusterStatus) -> bool:
    """Return whether no shard of the epoch has a sequence, or a block or slot that is not free."""
    epoch = status.view.epoch
    members = {member.shard_id for member in epoch.members} if epoch else set()
    return bool(members) and all(
        state.num_running == state.num_waiting == 0 and state.kv_blocks_free == state.kv_blocks_total
        and state.state_slots_free == state.state_slots_total
        for member, state in status.shards if member.shard_id in members)


def largest(footprints: Mapping[str, Footprint]) -> dict[str, Footprint]:
    """Return for each kind of process ("n0.1" and "n1.0" are both "n") the most of everything that one of it holds."""
    found: dict[str, Footprint] = {}
    for name, footprint in footprints.items():
        kind = name.partition(".")[0].rstrip("0123456789")
        known = found.get(kind, Footprint(0, 0, Counter(), 0))
        found[kind] = Footprint(max(known.resident_bytes, footprint.resident_bytes),
                                max(known.num_threads, footprint.num_threads), known.files | footprint.files,
                                max(known.num_segments, footprint.num_segments))
    return found


def growth(before: Mapping[str, Footprint], after: Mapping[str, Footprint], kv_cache_bytes: int) -> list[str]:
    """Return in words what a kind of process holds more of than it should, for equal groups that are idle."""
    found = []
    for kind, now in largest(after).items():
        first = largest(before).get(kind)
        if first is None:
            continue
        if now.resident_bytes > first.resident_bytes + GROWTH_BYTES + kv_cache_bytes:
            found.append(f"{kind}: {now.resident_bytes >> 20} MiB resident, {first.resident_bytes >> 20} at first")
        if now.num_segments > first.num_segments:
            found.append(f"{kind}: {now.num_segments} shared segments, {first.num_segments} at first")
        if now.num_threads > first.num_threads + THREADS_SPARE:
            found.append(f"{kind}: {now.num_threads} threads, {first.num_threads} at first")
        found += [f"{kind}: {num} open {what}, {first.files[what]} at first" for what, num in now.files.items()
                  if num > first.files[what] + FILES_SPARE]
    return found


async def until_idle(group: LocalGroup) -> ClusterStatus:
    """Raises LocalGroupError when something is still open then."""
    return await group.until(is_idle, "all sequences have ended and all blocks are free")
