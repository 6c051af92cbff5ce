"""One change of the placement of a running group, in stages that each fit into memory beside what runs. Pure.

A stage is the placement with some more layers as the target wants them. Every stage is a revision of the epoch: members
load what they lack beside what they have, then all switch between two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.planner.layer.error import PlacementError
from model.placement import Placement
from serving.link.epoch import Epoch, PlacementChange, PlannedPlacement, ShardStatus

MAX_CHANGES = 20            # that an epoch remembers
PREPARE_TIMEOUT_S = 600.0   # of one stage of a change


@dataclass(frozen=True, slots=True)
class ChangeState:
    """Holds what the coordinator knows of its group while a change runs."""

    epoch: Epoch                # the one that runs
    next: Epoch | None          # the revision that the members prepare


@dataclass(frozen=True, slots=True)
class AwaitedRevision:
    """Tracks how long the members have been preparing a revision."""

    revision: int = 0           # 0: none
    since_s: float = 0.0

    def is_late(self, prepared: Epoch | None, now_s: float) -> bool:
        """Return whether the members have had their time for this revision."""
        return (prepared is not None and prepared.revision == self.revision
                and now_s - self.since_s > PREPARE_TIMEOUT_S)

    def followed_by(self, prepared: Epoch | None, now_s: float) -> AwaitedRevision:
        """Return what to await when the members prepare this revision from now on; the same one goes on."""
        if prepared is None or prepared.revision == self.revision:
            return self
        return AwaitedRevision(prepared.revision, now_s)


def num_moved(old: Placement, new: Placement) -> int:
    """Count the expert copies that `new` has where `old` has none."""
    return sum(len(set(ranks) - set(before)) for layer, layer_before in zip(new.holders, old.holders, strict=True)
               for ranks, before in zip(layer, layer_before, strict=True))


def begin(epoch: Epoch, operation_id: str, why: str, target: PlannedPlacement, expert_bytes: int) -> Epoch:
    """Return the epoch with a change of this id, for `advance` to carry out. A failed one of that id is tried again."""
    change = PlacementChange(operation_id, why, num_moved(epoch.placement, target.placement) * expert_bytes,
                             epoch.revision, epoch.revision, target=target)
    others = tuple(entry for entry in epoch.changes if entry.operation_id != operation_id)
    return replace(epoch, changes=(*others, change)[-MAX_CHANGES:])


def advance(state: ChangeState, statuses: Sequence[ShardStatus], room_bytes: Sequence[int], expert_bytes: int,
            revision_above: int = 0, is_late: bool = False) -> ChangeState:
    """Look once at what the members report (all by rank): commit, fail, or prepare the next stage.

    New revisions are numbered above `revision_above` and above all that the members have heard of. is_late: the members
    have had their time for the revision that they prepare.
    """
    state = _settle(state, statuses, is_late)
    change = running_change(state.epoch)
    if change is None or change.target is None or state.next is not None:
        return state
    epoch = state.epoch
    heard_of = [max(status.revision, status.prepared_revision, status.failed_revision) for status in statuses]
    revision = 1 + max(epoch.revision, revision_above, *heard_of)
    target = change.target
    stage = next_stage(epoch.placement, target.placement, room_bytes, expert_bytes)
    change = replace(change, last_revision=revision)
    if stage.holders == target.placement.holders:
        after = replace(_updated(epoch, replace(change, state="done", target=None)), revision=revision,
                        placement=target.placement, shares=target.shares, figures=target.figures)
    else:
        after = replace(_updated(epoch, change), revision=revision, placement=stage)
    return ChangeState(_updated(epoch, change), after)


def _settle(state: ChangeState, statuses: Sequence[ShardStatus], is_late: bool) -> ChangeState:
    """Return what has come of the revision that the members prepare."""
    prepared = state.next
    if prepared is None:
        return state
    if all(status.revision == prepared.revision for status in statuses):
        return ChangeState(prepared, None)
    failed = [f"shard {status.shard_id}: {status.detail}" for status in statuses
              if status.failed_revision == prepared.revision]
    if is_late and not failed:
        failed = [f"shard {status.shard_id} has not prepared it in time" for status in statuses
                  if status.revision != prepared.revision]
    change = running_change(state.epoch)
    if not failed or change is None:
        return state
    ended = replace(change, state="failed", detail="; ".join(failed), target=None)
    return ChangeState(_updated(state.epoch, ended), None)


def next_stage(running: Placement, target: Placement, room_bytes: Sequence[int], expert_bytes: int) -> Placement:
    """Return `running` with as many layers of `target` as every member has room for; one layer at least.

    room_bytes: by rank, what the new experts of a stage may take beside the old ones until the switch. A member whose
    experts of a layer change builds that layer anew.
    """
    holders, taken = list(running.holders), [0] * running.num_members
    num_changed = 0
    for layer, wanted in enumerate(target.holders):
        if wanted == holders[layer]:
            continue
        needed = [_new_bytes(running, target, layer, rank, expert_bytes) for rank in range(running.num_members)]
        fits = all(had + need <= room for had, need, room in zip(taken, needed, room_bytes, strict=True))
        if num_changed and not fits:
            break
        holders[layer] = wanted
        taken = [had + need for had, need in zip(taken, needed, strict=True)]
        num_changed += 1
    return replace(target, holders=tuple(holders))


def _new_bytes(running: Placement, target: Placement, layer: int, rank: int, expert_bytes: int) -> int:
    experts = target.experts_of(layer, rank)
    return 0 if experts == running.experts_of(layer, rank) else len(experts) * expert_bytes


def find(epoch: Epoch, operation_id: str) -> PlacementChange | None:
    return next((change for change in epoch.changes if change.operation_id == operation_id), None)


def begun(epoch: Epoch, operation_id: str) -> PlacementChange | None:
    """Return the change of this id that runs or is done. One that has failed may begin anew."""
    known = find(epoch, operation_id)
    return known if known is not None and known.state != "failed" else None


def running_change(epoch: Epoch) -> PlacementChange | None:
    return next((change for change in epoch.changes if change.state == "running"), None)


def refuse_late(epoch: Epoch, planned_for: Epoch) -> None:
    """Raise PlacementError when another change is under way by now, or the group is another one."""
    busy = running_change(epoch)
    if busy is not None:
        raise PlacementError(f"change {busy.operation_id} is under way", fix="wait until it is done")
    if (epoch.number, epoch.revision) != (planned_for.number, planned_for.revision):
        raise PlacementError("the group changed while the placement was planned", fix="try again")


def ended_with(epoch: Epoch, detail: str) -> tuple[PlacementChange, ...]:
    """Return the changes of an epoch that goes no further: one that runs has failed."""
    return tuple(replace(change, state="failed", detail=detail, target=None) if change.state == "running" else change
                 for change in epoch.changes)


def _updated(epoch: Epoch, change: PlacementChange) -> Epoch:
    return replace(epoch, changes=tuple(change if entry.operation_id == change.operation_id else entry
                                        for entry in epoch.changes))
