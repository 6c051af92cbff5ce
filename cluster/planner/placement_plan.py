"""The members and options of a group's plan, and the plan. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.planner.costs.cost_model import StepPrediction
from cluster.planner.layer.problem import Split
from cluster.planner.memory_fit import Policy
from cluster.planner.memory_plan import MemberMemory, MemoryUse, RunningMembers
from model.placement import Placement
from serving.link.epoch import DeviceProfile, RequestShare

Solver = Literal["exact", "greedy", "even"]


@dataclass(frozen=True, slots=True)
class PlannedMember:
    name: str
    profile: DeviceProfile
    memory: MemberMemory
    pool: str = ""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    policy: Policy = "speed"                    # even: equal numbers of experts and requests
    min_copies: int = 1                         # members that every expert is on, at least
    exact: bool = True                          # False: in well under a second, for replans
    time_limit_s: float = 30.0                  # of the exact solver, for all layers together
    kept_roles: tuple[bool | None, ...] = ()    # who runs and takes requests or not; None: does not run; (): nobody
    running: RunningMembers | None = None       # None: nothing runs yet, so roles and room are the planner's choice


@dataclass(frozen=True, slots=True)
class MemberPlan:
    name: str
    share: RequestShare
    memory: MemoryUse
    num_expert_copies: int          # of all layers


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    placement: Placement
    splits: tuple[Split, ...]       # of each layer: the expected part of each holder
    members: tuple[MemberPlan, ...]
    prediction: StepPrediction
    bound_s: float                  # no placement in the same slots and no shares make a faster step (without an
                                    # exchange: no shares of the same members)
    kv_rows: float                  # rows of the workload's context that the KV caches hold together
    moved_bytes: int                # of expert copies that the previous placement has not
    solver: Solver

    @property
    def ratio(self) -> float:
        return self.prediction.step_s / self.bound_s

    @property
    def takes_requests(self) -> tuple[bool, ...]:
        return tuple(share.fraction > 0 for share in self.shares)

    @property
    def shares(self) -> tuple[RequestShare, ...]:
        return tuple(member.share for member in self.members)
