"""The coordinator tells this to shards, routers and the command line, and hears it from them. Plain values."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from serving.engine.expert_load import ExpertLoad
from serving.link.epoch import Epoch, Member, ShardStatus, WorkRatio


class ShardState(enum.StrEnum):
    STARTING = "starting"       # importing, measuring its device
    WAITING = "waiting"         # registered; in no group
    LOADING = "loading"         # weights
    LOADED = "loaded"           # waits for the other members
    JOINING = "joining"         # the process group
    READY = "ready"
    FAILED = "failed"           # this process will not come back; ShardStatus.detail says why


class GroupPhase(enum.StrEnum):
    WAITING = "waiting"         # no epoch: View.why says what is missing
    LOADING = "loading"         # the epoch's members load their weights
    JOINING = "joining"         # all have loaded; they form the process group
    READY = "ready"


@dataclass(frozen=True, slots=True)
class View:
    """Shows the state of the group, the same to everybody who asks."""

    phase: GroupPhase
    epoch: Epoch | None
    why: str = ""
    is_too_small: bool = False      # the members that it takes are here, and cannot hold the model
    next: Epoch | None = None       # a later revision of `epoch`, to be prepared while that serves
    ended_epoch_number: int = 0     # no epoch up to this one goes on; 0: the coordinator knows of none that has ended

    def has_ended(self, epoch_number: int) -> bool:
        """Return whether the members of that epoch are to leave it."""
        return self.ended_epoch_number >= epoch_number or (self.epoch is not None and self.epoch.number > epoch_number)

    @property
    def key(self) -> str:
        """Return what is equal for equal views, also across a restart of the coordinator."""
        number, revision = (self.epoch.number, self.epoch.revision) if self.epoch else (0, 0)
        operations = [change.operation_id for change in self.next.changes[-1:]] if self.next else []
        coming = f"{self.next.revision} {operations}" if self.next else ""
        return f"{self.ended_epoch_number}:{number}.{revision}>{coming} {self.phase} {self.why}"


@dataclass(frozen=True, slots=True)
class RouterReport:
    """Says how a router replica is. `epoch_number`: of the epoch that it serves, 0 for none."""

    router_id: str
    node_name: str
    http_address: str           # host:port of its own HTTP door
    grpc_address: str           # likewise of its gRPC door
    epoch_number: int
    is_ready: bool


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """Holds everything that the coordinator knows, for `moesaic status`."""

    view: View
    shards: tuple[tuple[Member, ShardStatus], ...]
    routers: tuple[RouterReport, ...]

    @property
    def is_ready(self) -> bool:
        """Return whether the group is ready and every router serves its epoch."""
        epoch = self.view.epoch
        return (self.view.phase is GroupPhase.READY and epoch is not None and bool(self.routers)
                and all(router.is_ready and router.epoch_number == epoch.number for router in self.routers))


@dataclass(frozen=True, slots=True)
class PlacementStatus:
    """Holds the placement that runs, the revision that is prepared, the counted load and the measured work."""

    epoch: Epoch
    next_revision: int | None
    load: ExpertLoad            # of all members together, older rows counted for less
    ratios: tuple[WorkRatio | None, ...]    # by rank; None: too little was timed
