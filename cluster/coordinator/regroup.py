"""The next epoch of a group that lost members or is to get some: as much as possible stays as it is. Pure.

Who goes on keeps role, experts, caches and sequences. Neither needs the planner's solver while streams wait: the better
placement comes afterwards, as a change within the new epoch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from cluster.coordinator.member_room import regroup_room_bytes
from cluster.coordinator.placement_change import begin, ended_with
from cluster.coordinator.reports import HAS_LEFT, IN_EPOCH, Report
from cluster.coordinator.view import ShardState
from cluster.planner.memory_plan import MemoryDemand
from cluster.planner.placement_without import Room, placement_without, scaled_shares
from serving.link.epoch import Epoch, Member, PlannedPlacement, RequestShare


@dataclass(frozen=True, slots=True)
class Remains:
    """What is left of an epoch that is over. All by rank in it."""

    here: dict[int, Report]         # they have left it, and can go on
    pending: dict[int, Report]      # they have yet to leave, or to be found dead

    @property
    def without_leavers(self) -> Remains:
        return Remains({rank: report for rank, report in self.here.items() if not report.status.is_leaving},
                       self.pending)

    def less(self, shard_ids: Collection[str]) -> Remains:
        """Return it as if those were gone."""
        return Remains({rank: report for rank, report in self.here.items()
                        if report.member.shard_id not in shard_ids}, self.pending)

    def gone(self, epoch: Epoch) -> frozenset[int]:
        return frozenset(range(len(epoch.members))) - set(self.here) - set(self.pending)


def remains_of(epoch: Epoch, reports: Sequence[Report], present: Collection[str]) -> Remains:
    """Judge the members of an epoch that is over. `present`: shard ids of those that were heard of lately.

    A member whose connection with another has ended is gone, unless it says itself that it has left the epoch: then it
    was the connection, and not the member.
    """
    of_shard = {report.member.shard_id: report for report in reports if report.member.shard_id in present}
    lost = {peer for report in of_shard.values() if report.status.epoch_number == epoch.number
            for peer in report.status.lost_peers}
    here, pending = {}, {}
    for rank, member in enumerate(epoch.members):
        report = of_shard.get(member.shard_id)
        if report is None:
            continue
        if report.status.state in HAS_LEFT or report.status.epoch_number < epoch.number:
            here[rank] = report
        elif member.shard_id not in lost:
            pending[rank] = report
    return Remains(here, pending)


def regroup(epoch: Epoch, remains: Remains, demand: MemoryDemand, number: int) -> Epoch:
    """Return the epoch in which those that are left go on. Raises PlacementError when they cannot hold the model."""
    here = [remains.here[rank] for rank in sorted(remains.here)]
    rooms = (regroup_room_bytes(report, epoch, rank, demand) for rank, report in sorted(remains.here.items()))
    # In whole experts: what a process takes changes all the time, and less than that is no news.
    room = Room(tuple(one // demand.expert_bytes * demand.expert_bytes for one in rooms), demand.expert_bytes)
    planned = placement_without(epoch, remains.gone(epoch), room)
    # As they describe themselves now: where a torch group meets changes with every epoch.
    return _after(epoch, number, tuple(report.member for report in here), planned)


def enlarged(epoch: Epoch, joiners: Sequence[Member], planned: PlannedPlacement, number: int,
             expert_bytes: int) -> Epoch:
    """Return the epoch in which those members go on, and `joiners` with them.

    `planned` is for all of them. Joiners hold what it gives them from the beginning, the others what they have; a
    change to all of it is begun, but for roles: they stay.
    """
    old = epoch.placement
    holders = tuple(tuple(tuple(sorted({*had, *(rank for rank in wanted if rank >= old.num_members)}))
                          for had, wanted in zip(layer, layer_wanted, strict=True))
                    for layer, layer_wanted in zip(old.holders, planned.placement.holders, strict=True))
    shares = _kept_roles(epoch.shares, planned.shares)
    first = PlannedPlacement(replace(planned.placement, holders=holders), shares)
    entered = _after(epoch, number, (*epoch.members, *joiners), first)
    names = ", ".join(joiner.shard_id for joiner in joiners)
    return begin(entered, f"join-{number}", f"{names} joined", replace(planned, shares=shares), expert_bytes)


def _after(epoch: Epoch, number: int, members: tuple[Member, ...], planned: PlannedPlacement) -> Epoch:
    return Epoch(number, members, planned.placement, rendezvous="", shares=planned.shares, figures=planned.figures,
                 changes=ended_with(epoch, "the members changed"))


def _kept_roles(shares: Sequence[RequestShare], wanted: Sequence[RequestShare]) -> tuple[RequestShare, ...]:
    kept = [share if rank >= len(shares) or (share.fraction > 0) == (shares[rank].fraction > 0) else shares[rank]
            for rank, share in enumerate(wanted)]
    return scaled_shares(kept)


def may_join(report: Report, epoch: Epoch, coming: Epoch | None) -> bool:
    """Return whether a shard waits to be taken in, or loads for that."""
    if report.status.is_leaving or epoch.rank_of(report.member.shard_id) is not None:
        return False
    if report.status.state == ShardState.WAITING:
        return coming is None or report.status.epoch_number != coming.number
    return (coming is not None and report.status.epoch_number == coming.number and report.status.state in IN_EPOCH)
