"""What the coordinator has last heard of a shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster.coordinator.view import ShardState
from serving.link.epoch import Member, ShardStatus

IN_EPOCH = (ShardState.LOADING, ShardState.LOADED, ShardState.JOINING, ShardState.READY)
HAS_LEFT = (ShardState.WAITING, ShardState.BROKEN)      # any epoch that it was in


@dataclass(frozen=True, slots=True)
class Report:
    """Holds what a shard has said of itself."""

    member: Member
    status: ShardStatus
    at_s: float                 # the last time
    first_s: float = 0.0        # the first time


def shown(reports: Mapping[str, Report], details: Mapping[str, str]) -> tuple[tuple[Member, ShardStatus], ...]:
    """Return the shards and what they said, by shard id; of some with what the coordinator says of them instead."""
    return tuple((report.member, replace(report.status, detail=details.get(shard_id, report.status.detail)))
                 for shard_id, report in sorted(reports.items()))
