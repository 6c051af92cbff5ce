"""The coordinator tells this to shards, routers and the command line, and hears it from them. Plain values."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from serving.engine.expert_load import ExpertLoad
from serving.link.epoch import Epoch, Member, ShardStatus, WorkRatio
from serving.router.router_load import RouterLoad


class ShardState(enum.StrEnum):
    STARTING = "starting"       # importing, measuring its device
    WAITING = "waiting"         # registered; in no group
    LOADING = "loading"         # weights
    LOADED = "loaded"           # waits for the other members
    JOINING = "joining"         # the process group
    READY = "ready"
    BROKEN = "broken"           # its epoch is over; it keeps weights, caches and sequences for the next one
    FAILED = "failed"           # this process will not come back; ShardStatus.detail says why


class GroupPhase(enum.StrEnum):
    WAITING = "waiting"         # no epoch: View.why says what is missing
    LOADING = "loading"         # the epoch's members load their weights
    JOINING = "joining"         # all have loaded; they form the process group
    READY = "ready"


# broke: its members went on without anybody gone. cut_off: who went lives, and could not reach another member.
MembershipCause = Literal["start", "died", "hung", "cut_off", "joined", "drained", "resized", "broke", "slept"]


@dataclass(frozen=True, slots=True)
class MembershipChange:
    """One change of the group's members. Times in ms from its first sign; None: not yet, or there was no such thing."""

    epoch_before: int               # 0: there was none
    epoch_after: int                # 0: there is none yet
    cause: MembershipCause
    shard_ids: tuple[str, ...]      # who went; who came where nobody went
    at_s: float                     # when it was noticed, wall clock
    detected_ms: float | None = None    # until it was certain; of a silent member from when it was last heard
    regrouped_ms: float | None = None   # until the next epoch was decided on
    loaded_ms: float | None = None      # until its members had their weights
    resumed_ms: float | None = None     # until the group ran again
    detail: str = ""
    moved: Mapping[str, int] = field(default_factory=dict)      # sequences that went on elsewhere for it, by way

    @property
    def pause_s(self) -> float | None:
        """Return how long the group stood still. None: it has yet to go on, or stood before."""
        if self.resumed_ms is None or self.cause in ("start", "slept"):
            return None
        return (self.resumed_ms - ((self.regrouped_ms or 0.0) if self.is_planned else 0.0)) / 1e3

    def __str__(self) -> str:
        """Return it as the log shows it."""
        return (f"epoch_before={self.epoch_before} epoch_after={self.epoch_after} cause={self.cause} "
                f"shard_ids={','.join(self.shard_ids)} detected_ms={self.detected_ms} regrouped_ms={self.regrouped_ms} "
                f"loaded_ms={self.loaded_ms} resumed_ms={self.resumed_ms} detail={self.detail}")

    @property
    def is_planned(self) -> bool:
        """Return whether the group went on while it was prepared."""
        return self.cause in ("joined", "drained", "resized")


@dataclass(frozen=True, slots=True)
class LeaveOrder:
    """Tells some members to leave."""

    operation_id: str               # whoever asks twice with the same one gets the same operation
    target: str                     # a shard, a node, or a pool that is to have fewer
    shard_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Remembered:
    """Holds what a coordinator knows beside its epoch: members keep it for the one that takes its place."""

    changes: tuple[MembershipChange, ...] = ()      # the latest, oldest first; the last may be under way
    orders: tuple[LeaveOrder, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()         # of pools, shards that they are to have and Serve does not know of


NOTHING = Remembered()


@dataclass(frozen=True, slots=True)
class View:
    """Shows the state of the group, the same to everybody who asks."""

    phase: GroupPhase
    epoch: Epoch | None
    why: str = ""
    is_too_small: bool = False      # the members that it takes are here, and cannot hold the model
    next: Epoch | None = None       # a later revision of `epoch`, to be prepared while that serves
    coming: Epoch | None = None     # the epoch after `epoch`: those who are new in it load while that serves
    leaving: tuple[str, ...] = ()   # shard ids of members that are to go: routers send them nothing new
    dismissed: tuple[str, ...] = ()     # shard ids of those whose processes are to end
    ended_epoch_number: int = 0     # no epoch up to this one goes on; 0: the coordinator knows of none that has ended
    is_asleep: bool = False         # it sleeps, or wakes up from that: routers hold what comes
    remembered: Remembered = NOTHING            # once an epoch is known

    def has_ended(self, epoch_number: int) -> bool:
        """Return whether the members of that epoch are to leave it."""
        return self.ended_epoch_number >= epoch_number or (self.epoch is not None and self.epoch.number > epoch_number)

    def joins(self, epoch_number: int) -> bool:
        """Return whether the members of that epoch are to form its group."""
        return (self.epoch is not None and self.epoch.number == epoch_number
                and self.phase in (GroupPhase.JOINING, GroupPhase.READY))

    def has_withdrawn(self, epoch_number: int) -> bool:
        """Return whether an epoch that was coming does not come any more, while the one before it goes on."""
        return (self.epoch is not None and self.epoch.number < epoch_number
                and (self.coming is None or self.coming.number != epoch_number))

    @property
    def key(self) -> str:
        """Return what is equal for equal views, also across a restart of the coordinator."""
        number, revision = (self.epoch.number, self.epoch.revision) if self.epoch else (0, 0)
        operations = [change.operation_id for change in self.next.changes[-1:]] if self.next else []
        coming = f"{self.next.revision} {operations}" if self.next else ""
        after, leaving = self.coming.number if self.coming else "", " ".join((*self.leaving, "/", *self.dismissed))
        orders = [order.operation_id for order in self.remembered.orders], self.remembered.sizes
        return (f"{self.ended_epoch_number}:{number}.{revision}>{coming}>{after} -{leaving} {orders} {self.phase} "
                f"{self.why}")


@dataclass(frozen=True, slots=True)
class RouterReport:
    """Says how a router replica is. `epoch_number`: of the epoch that it serves, 0 for none."""

    router_id: str
    node_name: str
    http_address: str           # host:port of its own HTTP door
    grpc_address: str           # likewise of its gRPC door
    epoch_number: int
    is_ready: bool
    load: RouterLoad = RouterLoad()
    num_moved: Mapping[str, int] = field(default_factory=dict)      # sequences that went on elsewhere, by way


@dataclass(frozen=True, slots=True)
class PoolSizeChange:
    """One change of the replicas of a pool that the autoscaler has begun."""

    pool: str
    before: int
    after: int
    why: str
    at_s: float                     # wall clock


@dataclass(frozen=True, slots=True)
class AutoscalerStatus:
    """Holds the autoscaler's latest decision."""

    wanted: dict[str, int]          # replicas, by pool
    kind: str                       # of what is needed most: first token, decode, KV cache
    ratio: float                    # what is needed of it over what is wanted can do
    text: str                       # the same in words
    backlog_s: float                # until those that serve now would have computed all prompts that wait
    waits_for: str                  # "" for nothing
    changes: tuple[PoolSizeChange, ...]     # the latest, oldest first


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """Holds everything that the coordinator knows, for `moesaic status`."""

    view: View
    shards: tuple[tuple[Member, ShardStatus], ...]
    routers: tuple[RouterReport, ...]
    membership_changes: tuple[MembershipChange, ...] = ()       # the latest, oldest first; the last may be under way
    autoscaler: AutoscalerStatus | None = None      # None: none is configured, or it has yet to decide

    @property
    def health(self) -> str:
        """Return it in a word."""
        return "healthy" if self.is_ready else "asleep" if self.view.is_asleep else str(self.view.phase)

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
    membership_changes: tuple[MembershipChange, ...] = ()       # as in ClusterStatus
    autoscaler: AutoscalerStatus | None = None      # as in ClusterStatus
