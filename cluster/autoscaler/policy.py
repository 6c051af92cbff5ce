"""The replicas of each pool that the load needs: snapshot and history in, wanted counts and reasons out. Pure.

It grows when what is wanted does not meet the demand, by enough for somewhat more and for what arrives to go on; it
shrinks when fewer would meet still more than the highest demand of the keep-alive time. Between the two nothing
changes, so noise changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.autoscaler.capability import Capability, ScalingRules, Shortfall
from cluster.autoscaler.demand import Demand, DemandHistory, observe
from cluster.autoscaler.fleet import Counts, FleetSnapshot, PoolState

GROW_TO = (1.1, 1.25)       # times what arrives, and what is there
SHRINK_AT = (1.2, 1.5)      # above those in both, so that what has grown does not shrink for the same demand
STUCK_S = 60.0              # a replica that is awaited so long, and STUCK_STARTS times its usual start, may never come
STUCK_STARTS = 4.0
MIN_WINDOW_S, MAX_WINDOW_S = 2.0, 60.0      # in which arrivals are counted; between them two starts of a replica


@dataclass(frozen=True, slots=True)
class PoolChange:
    pool: str
    before: int
    after: int
    why: str


@dataclass(frozen=True, slots=True)
class Decision:
    wanted: dict[str, int]              # replicas, by pool
    changes: tuple[PoolChange, ...]     # from what was wanted before
    signal: Shortfall                   # of what is wanted from now on, for the demand of now
    demand: Demand
    backlog_s: float                    # until what is ready now would have computed all prompts that wait
    waits_for: str                      # "" for nothing
    history: DemandHistory              # to be given to the next decision


def decide(fleet: FleetSnapshot, rules: ScalingRules, history: DemandHistory, now_s: float) -> Decision:
    """Decide how many replicas of each pool there should be. In which order the pools are named changes nothing."""
    fleet = replace(fleet, pools=tuple(sorted(fleet.pools, key=lambda pool: pool.name)))
    ready_s = max((pool.facts.ready_s for pool in fleet.pools if pool.facts is not None), default=0.0)
    window_s = min(MAX_WINDOW_S, max(MIN_WINDOW_S, 2 * ready_s))
    woken = history.has_slept and any(fleet.wanted)
    history, demand = observe(replace(history, idle_since_s=None) if woken else history, fleet.work, now_s, window_s,
                              ready_s, rules.keep_alive_s)
    history = replace(history, has_slept=not any(fleet.wanted))
    stuck = frozenset(pool.name for pool in fleet.pools if _is_stuck(pool, now_s))
    capability = Capability(fleet, rules, stuck)
    counts, why = _decide_counts(_Choice(fleet, rules, capability, stuck), history, demand, now_s)
    changes = tuple(PoolChange(pool.name, pool.num_wanted, count, why) for pool, count
                    in zip(fleet.pools, counts, strict=True) if count != pool.num_wanted)
    return Decision({pool.name: count for pool, count in zip(fleet.pools, counts, strict=True)}, changes,
                    capability.shortfall(counts, demand), demand, capability.wait_s(fleet.ready, demand),
                    _waits_for(fleet, counts, stuck), history)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What one decision is made from."""

    fleet: FleetSnapshot
    rules: ScalingRules
    capability: Capability
    stuck: frozenset[str]

    def price(self, index: int) -> float:
        """Return what one more replica costs: money, and time until it is of use."""
        pool = self.fleet.pools[index]
        ready_s = pool.facts.ready_s if pool.facts is not None else 0.0
        return pool.cost_per_hour * (ready_s + self.rules.ttft_slo_s)


def _decide_counts(choice: _Choice, history: DemandHistory, demand: Demand, now_s: float) -> tuple[Counts, str]:
    fleet, rules = choice.fleet, choice.rules
    asleep = (0,) * len(fleet.pools)
    if rules.idle_timeout_s is not None and history.idle_since_s is not None:
        idle_s = now_s - history.idle_since_s
        if not any(fleet.wanted) or idle_s >= rules.idle_timeout_s:
            return asleep, f"no request for {idle_s:.0f} s"
    base = tuple(min(max(pool.num_wanted, pool.least), pool.most) for pool in fleet.pools)
    limits = "within the limits of the pool" if any(fleet.wanted) else "a request came"
    if all(pool.facts is None for pool in fleet.pools):
        start = tuple(min(max(pool.num_start, pool.least), pool.most) for pool in fleet.pools)
        return base if any(fleet.wanted) else start, limits
    held = _grown(choice, base, choice.capability.memory_ratio)
    lacking = choice.capability.shortfall(held, demand)
    if lacking.ratio > 1:
        more, measure = demand.times(*GROW_TO), choice.capability.lasting_shortfall
        return _grown(choice, held, lambda counts: measure(counts, more).ratio), lacking.text
    if held != base:
        return held, "fewer do not hold the model"
    has_looked_enough = history.since_s is not None and now_s - history.since_s >= rules.keep_alive_s
    fewer = _shrunk(choice, base, history.peak().times(*SHRINK_AT)) if has_looked_enough else base
    if fewer == base:
        return base, limits
    return fewer, f"fewer are enough for more than the highest load of the last {rules.keep_alive_s:g} s"


def _grown(choice: _Choice, counts: Counts, needed_over_there: Callable[[Counts], float]) -> Counts:
    """Add replicas until the ratio is 1: the cheapest where one is enough, else what gains most for its price."""
    while (ratio := needed_over_there(counts)) > 1:
        options = [(index, _plus(counts, index, 1)) for index, pool in enumerate(choice.fleet.pools)
                   if counts[index] < pool.most and pool.facts is not None and pool.name not in choice.stuck]
        rated = [(needed_over_there(more), index, more) for index, more in options]
        enough = [(choice.price(index), index, more) for after, index, more in rated if after <= 1]
        if enough:
            return min(enough)[2]
        useful = [(_gain(ratio, after) / choice.price(index), -index, more) for after, index, more in rated
                  if after < ratio]
        if not useful:
            return counts
        counts = max(useful)[2]
    return counts


def _shrunk(choice: _Choice, counts: Counts, demand: Demand) -> Counts:
    """Take replicas away while the others hold the model and meet the demand: always what is lost least, by price."""
    while True:
        options = []
        for index, pool in enumerate(choice.fleet.pools):
            fewer = _plus(counts, index, -1)
            if counts[index] <= pool.least or pool.facts is None or choice.capability.missing_bytes(fewer):
                continue
            ratio = choice.capability.lasting_shortfall(fewer, demand).ratio
            if ratio <= 1:
                options.append((ratio / pool.cost_per_hour, index, fewer))
        if not options:
            return counts
        counts = min(options)[2]


def _plus(counts: Counts, index: int, step: int) -> Counts:
    return (*counts[:index], counts[index] + step, *counts[index + 1:])


def _gain(before: float, after: float) -> float:
    """Return what is gained, as a part; from nothing at all any is everything."""
    return 1.0 / after if before == float("inf") else before - after


def _is_stuck(pool: PoolState, now_s: float) -> bool:
    if pool.awaited_since_s is None:
        return False
    usual_s = pool.facts.ready_s if pool.facts is not None else 0.0
    return now_s - pool.awaited_since_s > max(STUCK_S, STUCK_STARTS * usual_s)


def _waits_for(fleet: FleetSnapshot, counts: Counts, stuck: frozenset[str]) -> str:
    awaited = []
    for pool, count in zip(fleet.pools, counts, strict=True):
        if count > pool.num_ready:
            usual = f", usually {pool.facts.ready_s:.0f} s" if pool.facts is not None else ""
            late = "; they do not come, others take their place" if pool.name in stuck else ""
            awaited.append(f"{count - pool.num_ready} of pool {pool.name}{usual}{late}")
        elif count < pool.num_ready:
            awaited.append(f"{pool.num_ready - count} of pool {pool.name} to leave")
    return "; ".join(awaited)
