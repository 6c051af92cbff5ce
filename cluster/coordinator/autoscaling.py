"""The autoscaler of a running service: of what is heard it makes a snapshot, and of the decision what is shown.

Pure: time is an argument. It loads SciPy when it first decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace

from cluster.autoscaler.capability import ScalingRules
from cluster.autoscaler.demand import DemandHistory
from cluster.autoscaler.fleet import FleetSnapshot, PoolState, ReplicaFacts, Work
from cluster.autoscaler.policy import Decision, decide
from cluster.coordinator.group_size import PoolSize
from cluster.coordinator.view import AutoscalerStatus, PoolSizeChange
from cluster.planner.memory_demand import sequence_bytes
from cluster.planner.memory_plan import MemberMemory
from cluster.planner.plan_rules import PlanRules
from serving.config import ServeConfig
from serving.link.epoch import Epoch, Member
from serving.router.router_load import RouterLoad

UNMEASURED_READY_S = 30.0       # taken for the start of a replica, until one was seen
REMEASURE_S = 30.0              # a pool's speed is worked out again after so long: members time their work meanwhile
NUM_SHOWN = 8                   # of the latest changes


@dataclass(frozen=True, slots=True)
class Heard:
    """What the coordinator knows when the autoscaler decides."""

    sizes: Mapping[str, PoolSize]
    epoch: Epoch | None             # that runs, with what its members have measured; None: the service sleeps
    leaving: tuple[str, ...]        # shard ids
    loads: Mapping[str, RouterLoad]     # by router id


class Autoscaler:
    """Remembers between two decisions what came, what pools are good for and how long their replicas take to start."""

    def __init__(self, config: ServeConfig, plan: PlanRules) -> None:
        assert config.autoscaling is not None, "a service without goals has no autoscaler"
        goals, context_tokens = config.autoscaling, plan.config.context_tokens
        self._plan = plan
        self._rules = ScalingRules(
            goals.ttft_slo_s, goals.itl_slo_s, goals.keep_alive_s, goals.idle_timeout_s, plan.demand,
            plan.config.min_copies, sequence_bytes(plan.args, context_tokens, plan.dtype_bytes) / context_tokens,
            plan.config.policy)
        self._costs = {pool.name: pool.cost_per_hour for pool in config.pools}
        self._num_start = {pool.name: pool.replicas for pool in config.pools}
        self._history = DemandHistory()
        self._arrived = ArrivalTotals()
        self._facts: dict[str, tuple[float, ReplicaFacts]] = {}     # by pool, with the time when they were worked out
        self._starts = PoolStarts()
        self._changes: tuple[PoolSizeChange, ...] = ()

    def decide(self, heard: Heard, now_s: float) -> Decision:
        """Decide on the pools' sizes. What is decided need not come to be: the next decision sees what has."""
        members = heard.epoch.members if heard.epoch is not None else ()
        ready = Counter(member.pool for member in members if member.shard_id not in heard.leaving)
        pools = tuple(self._pool(name, size, ready[name], members, now_s) for name, size in heard.sizes.items())
        decision = decide(FleetSnapshot(pools, self._arrived.work(heard.loads)), self._rules, self._history, now_s)
        self._history = decision.history
        return decision

    def status(self, decision: Decision, refused: str, at_s: float) -> AutoscalerStatus:
        """Return what is to be shown of a decision. `at_s`: wall clock; `refused`: why a change could not begin."""
        self._changes = (*self._changes, *(PoolSizeChange(change.pool, change.before, change.after, change.why, at_s)
                                           for change in decision.changes if not refused))[-NUM_SHOWN:]
        waits_for = "; ".join(part for part in (refused, decision.waits_for) if part)
        return AutoscalerStatus(decision.wanted, decision.signal.kind, decision.signal.ratio, decision.signal.text,
                                decision.backlog_s, waits_for, self._changes)

    def _pool(self, name: str, size: PoolSize, num_ready: int, members: Sequence[Member], now_s: float) -> PoolState:
        awaited_since_s = self._starts.observe(name, size.wanted, num_ready, now_s)
        member = next((one for one in members if one.pool == name and one.profile is not None), None)
        known = self._facts.get(name)
        if member is not None and (known is None or now_s - known[0] >= REMEASURE_S):
            self._facts[name] = (now_s, self._measured(member))
        facts = self._facts[name][1] if name in self._facts else None
        if facts is not None:
            facts = replace(facts, ready_s=self._starts.ready_s(name))
        return PoolState(name, size.least, size.most, size.wanted, num_ready, facts, self._costs[name],
                         awaited_since_s, self._num_start[name])

    def _measured(self, member: Member) -> ReplicaFacts:
        from cluster.autoscaler.speed import replica_speed

        assert member.profile is not None, "only members that have measured their device are in an epoch"
        speed = replica_speed(self._plan.args, self._plan.dtype_bytes, member.profile,
                              self._plan.config.context_tokens, self._plan.max_batch_tokens)
        memory = MemberMemory(member.pool, member.facts.memory_budget_bytes, member.facts.resident_bytes)
        return ReplicaFacts(speed.prefill_tokens_per_s, speed.rows_within(self._rules.itl_slo_s), memory, 0.0)


class PoolStarts:
    """Measures how long it takes from the wish for a replica until it serves."""

    def __init__(self) -> None:
        self._awaited_since_s: dict[str, float] = {}
        self._last_ready: dict[str, int] = {}
        self._ready_s: dict[str, float] = {}

    def observe(self, pool: str, num_wanted: int, num_ready: int, now_s: float) -> float | None:
        """Return since when the pool has fewer than it is to have; None: it has them."""
        since_s = self._awaited_since_s.get(pool)
        if since_s is not None and num_ready > self._last_ready[pool]:
            self._ready_s[pool] = now_s - since_s
        self._last_ready[pool] = num_ready
        if num_ready >= num_wanted:
            self._awaited_since_s.pop(pool, None)
            return None
        return self._awaited_since_s.setdefault(pool, now_s)

    def ready_s(self, pool: str) -> float:
        return self._ready_s.get(pool, UNMEASURED_READY_S)


class ArrivalTotals:
    """Adds up what came to all routers; one that is gone takes nothing away."""

    def __init__(self) -> None:
        self._last: dict[str, RouterLoad] = {}      # by router id, which is new for each process
        self._totals = (0, 0, 0)

    def work(self, loads: Mapping[str, RouterLoad]) -> Work:
        for router_id, load in loads.items():
            last = self._last.get(router_id, load)      # of a router that is new here nobody knows when it came
            more = (load.num_arrived - last.num_arrived, load.num_prompt_tokens - last.num_prompt_tokens,
                    load.num_output_tokens - last.num_output_tokens)
            self._totals = (self._totals[0] + more[0], self._totals[1] + more[1], self._totals[2] + more[2])
        self._last = dict(loads)
        every = [astuple(load)[:4] for load in (*loads.values(), RouterLoad())]
        held, waiting, decoding, kv = (sum(values) for values in zip(*every, strict=True))
        return Work(held, waiting, decoding, kv, *self._totals)
