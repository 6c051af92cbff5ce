"""The fleet that a trace is simulated on: its pools, and what a step of any number of their replicas takes. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cluster.autoscaler.capability import GROUP_EFFICIENCY, Capability, ScalingRules
from cluster.autoscaler.fleet import Counts, FleetSnapshot, PoolState, ReplicaFacts, Work
from cluster.autoscaler.speed import ReplicaSpeed
from cluster.planner.memory_plan import MemberMemory
from model.arrays import FloatArray

_GRID_POINTS = 96


@dataclass(frozen=True, slots=True)
class SimulatedPool:
    name: str
    most: int
    speed: ReplicaSpeed
    memory: MemberMemory
    ready_s: float
    cost_per_hour: float
    least: int = 0


@dataclass
class FleetModel:
    """Answers for any counts of replicas; what was asked once is known."""

    pools: tuple[SimulatedPool, ...]
    rules: ScalingRules
    max_batch_tokens: int
    max_running: int                # sequences of one replica
    _tables: dict[Counts, tuple[FloatArray, FloatArray]] = field(default_factory=dict)

    def snapshot(self, wanted: Counts, ready: Counts, work: Work) -> FleetSnapshot:
        """Return what the autoscaler is told, as a coordinator would."""
        states = tuple(PoolState(
            pool.name, pool.least, pool.most, wanted[index], ready[index], self._facts(pool), pool.cost_per_hour)
            for index, pool in enumerate(self.pools))
        return FleetSnapshot(states, work)

    def holds(self, counts: Counts) -> bool:
        return not self._capability().missing_bytes(counts)

    def kv_room(self, counts: Counts) -> float:
        return self._capability().kv_room(counts)

    def step_s(self, counts: Counts, num_rows: float) -> float:
        """Return what a step takes in which every member gets the rows that it computes in the same time."""
        rows, seconds = self._table(counts)
        if num_rows > rows[-1]:
            return float(seconds[-1] * num_rows / rows[-1])
        return float(np.interp(num_rows, rows, seconds))

    def rows_within(self, counts: Counts, seconds: float) -> float:
        rows, grid = self._table(counts)
        return float(np.interp(seconds, grid, rows))

    def most(self) -> Counts:
        return tuple(pool.most for pool in self.pools)

    def _facts(self, pool: SimulatedPool) -> ReplicaFacts:
        rows = pool.speed.rows_within(self.rules.itl_slo_s)
        return ReplicaFacts(pool.speed.prefill_tokens_per_s, rows, pool.memory, pool.ready_s)

    def _capability(self) -> Capability:
        none = (0,) * len(self.pools)
        return Capability(self.snapshot(none, none, Work()), self.rules)

    def _table(self, counts: Counts) -> tuple[FloatArray, FloatArray]:
        """Return rows of a step and their seconds, both rising."""
        if counts not in self._tables:
            part = GROUP_EFFICIENCY if sum(counts) > 1 else 1.0
            present = [(pool.speed, count) for pool, count in zip(self.pools, counts, strict=True) if count]
            longest = max(speed.step_s[-1][1] for speed, _ in present)
            least = min(speed.step_s[0][1] / (count + 1) for speed, count in present) / 8
            knots = [seconds for speed, _ in present for _, seconds in speed.step_s]
            grid = np.union1d(np.geomspace(least, longest, _GRID_POINTS), knots)
            rows = np.array([part * sum(count * speed.rows_within(float(seconds)) for speed, count in present)
                             for seconds in grid])
            self._tables[counts] = (rows, grid)
        return self._tables[counts]
