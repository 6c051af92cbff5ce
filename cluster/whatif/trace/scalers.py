"""What may decide the replicas in a simulation: nobody, or the autoscaler that also decides for a running service."""

from __future__ import annotations

from typing import Protocol

from cluster.autoscaler.demand import DemandHistory
from cluster.autoscaler.fleet import Counts, Work
from cluster.autoscaler.policy import Decision, decide
from cluster.whatif.trace.fleet_model import FleetModel


class Scaler(Protocol):
    """Is asked now and then, with what runs and what there is to do."""

    def wanted(self, now_s: float, wanted: Counts, ready: Counts, work: Work) -> Counts: ...


class FixedSize:
    """The same number of replicas all the time."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def wanted(self, now_s: float, wanted: Counts, ready: Counts, work: Work) -> Counts:
        return self._counts


class OurScaler:
    """The policy of `cluster/autoscaler`, with its memory. `decisions`: those that changed anything."""

    def __init__(self, model: FleetModel) -> None:
        self.decisions: list[tuple[float, Decision]] = []
        self._model = model
        self._history = DemandHistory()

    def wanted(self, now_s: float, wanted: Counts, ready: Counts, work: Work) -> Counts:
        decision = decide(self._model.snapshot(wanted, ready, work), self._model.rules, self._history, now_s)
        self._history = decision.history
        if decision.changes:
            self.decisions.append((now_s, decision))
        return tuple(decision.wanted[pool.name] for pool in self._model.pools)
