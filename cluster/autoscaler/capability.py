"""The answer whether so many replicas of each pool are enough for a demand, and what they lack. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from cluster.autoscaler.demand import Demand
from cluster.autoscaler.fleet import Counts, FleetSnapshot, PoolState, ReplicaFacts
from cluster.planner.memory_fit import Policy, memory_fit
from cluster.planner.memory_plan import MemberMemory, MemoryDemand

Kind = Literal["memory", "arrivals", "first token", "decode", "KV cache"]

GROUP_EFFICIENCY = 0.9      # of what members compute alone, that a group of them makes; measured: 0.89 to 0.98
BUSY = 0.9                  # part of the time that lasting arrivals may take: above it queues grow
WAIT_PART = 0.6             # of the SLO of the first token, that waiting may take
SAVED_PART = 0.2            # of that SLO, beyond the start of a replica: a wait that it can still make good
KV_PART = 0.9               # of the KV room that may be used
_MOST_DECODE_PART = 0.9     # of the work's time: prefill always gets the rest


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """The goals of the service, and what its model takes."""

    ttft_slo_s: float
    itl_slo_s: float
    keep_alive_s: float             # a replica that has not been needed for so long goes
    idle_timeout_s: float | None    # without any request for so long all go; None: never
    demand: MemoryDemand
    min_copies: int                 # of every expert
    kv_token_bytes: float           # of one token of one sequence, states included
    policy: Policy = "speed"


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Says what is needed over what is there, of what lacks most; up to 1 it is enough."""

    kind: Kind
    ratio: float
    text: str


class Capability:
    """What the pools of one fleet can do, at any counts of replicas. Pools without facts count for nothing."""

    def __init__(self, fleet: FleetSnapshot, rules: ScalingRules, stuck: frozenset[str] = frozenset()) -> None:
        self._pools = fleet.pools
        self._rules = rules
        self._stuck = stuck         # pools whose wanted replicas do not come: only those that are ready count
        self._ready = self._rates(fleet.ready)
        self._start_s = max((pool.facts.ready_s for pool in fleet.pools if pool.facts is not None), default=0.0)

    def missing_bytes(self, counts: Counts) -> int:
        """Return the memory that these replicas lack to hold the model; 0: they hold it."""
        memories = tuple((facts.memory, count) for facts, count in self._counted(counts) if count)
        return _missing_bytes(memories, self._rules.demand, self._rules.min_copies, self._rules.policy)

    def memory_ratio(self, counts: Counts) -> float:
        total = self._rules.demand.num_slots * self._rules.demand.expert_bytes + self._rules.demand.fixed_bytes
        return 1.0 + self.missing_bytes(counts) / max(1, total)

    def shortfall(self, counts: Counts, demand: Demand) -> Shortfall:
        """Return what lacks most for the demand, with these replicas as soon as they are ready."""
        return max((self._first_token(counts, demand), self._decode(counts, demand), self._kv_cache(counts, demand)),
                   key=lambda one: one.ratio)

    def lasting_shortfall(self, counts: Counts, demand: Demand) -> Shortfall:
        """Return the same for a demand that stays: they also keep up with what arrives."""
        return max(self.shortfall(counts, demand), self._arrivals(counts, demand), key=lambda one: one.ratio)

    def wait_s(self, counts: Counts, demand: Demand) -> float:
        """Return when the last prompt that waits has its first token."""
        waiting, now_rate, rate = demand.num_waiting_tokens, self._now_rate(demand), self._prefill_rate(counts, demand)
        ready_s = self._ready_s(counts)
        if not waiting:
            return 0.0
        if waiting <= now_rate * ready_s or not rate:
            return waiting / now_rate if now_rate else float("inf")
        return ready_s + (waiting - now_rate * ready_s) / rate

    def later_wait_s(self, counts: Counts, demand: Demand) -> float:
        """Return how long a prompt waits that comes when another replica could be ready."""
        more = (demand.prompt_tokens_per_s - self._now_rate(demand)) * self._start_s
        rate = self._prefill_rate(counts, demand)
        return _over(demand.num_waiting_tokens + more, rate)

    def kv_room(self, counts: Counts) -> float:
        """Return the tokens of sequences for which these replicas have memory, if all of them take requests."""
        demand, room = self._rules.demand, 0
        for facts, count in self._counted(counts):
            fixed = demand.shared_bytes + demand.buffer_bytes + facts.memory.resident_bytes
            room += count * max(0, facts.memory.budget_bytes - fixed)
        experts = self._rules.min_copies * demand.num_slots * demand.expert_bytes
        return max(0.0, (room - experts) / self._rules.kv_token_bytes)

    def _arrivals(self, counts: Counts, demand: Demand) -> Shortfall:
        rate, rows = self._rates(counts)
        prompts, outputs = demand.prompt_tokens_per_s, demand.output_tokens_per_s
        used = _over(prompts, rate) + _over(outputs * self._rules.itl_slo_s, rows)
        return Shortfall("arrivals", used / BUSY, f"{prompts:,.0f} prompt and {outputs:,.0f} output tokens/s take "
                         f"{used:.0%} of the time")

    def _first_token(self, counts: Counts, demand: Demand) -> Shortfall:
        slo_s, waiting = self._rules.ttft_slo_s, f"{demand.num_waiting_tokens:,.0f} prompt tokens wait"
        wait_s, later_s = self.wait_s(counts, demand), self.later_wait_s(counts, demand)
        aim_s = max(WAIT_PART * slo_s, self._ready_s(counts) + SAVED_PART * slo_s)
        if wait_s / aim_s >= later_s / (WAIT_PART * slo_s):
            return Shortfall("first token", wait_s / aim_s, f"{waiting}, the last for {wait_s:.1f} s")
        return Shortfall("first token", later_s / (WAIT_PART * slo_s), f"{waiting}, and as "
                         f"{demand.prompt_tokens_per_s:,.0f}/s come, soon for {later_s:.1f} s")

    def _decode(self, counts: Counts, demand: Demand) -> Shortfall:
        rows = self._rates(counts)[1]
        return Shortfall("decode", _over(demand.num_decoding, rows), f"{demand.num_decoding:.0f} sequences decode, "
                         f"{rows:.0f} can within {self._rules.itl_slo_s:g} s a token")

    def _kv_cache(self, counts: Counts, demand: Demand) -> Shortfall:
        room = self.kv_room(counts) * KV_PART
        return Shortfall("KV cache", _over(demand.num_kv_tokens, room), f"{demand.num_kv_tokens:,.0f} tokens want room "
                         f"in the KV caches, {room:,.0f} have some")

    def _counted(self, counts: Counts) -> list[tuple[ReplicaFacts, int]]:
        return [(pool.facts, self._present(pool, count)) for pool, count in zip(self._pools, counts, strict=True)
                if pool.facts is not None]

    def _present(self, pool: PoolState, count: int) -> int:
        return min(count, pool.num_ready) if pool.name in self._stuck else count

    def _rates(self, counts: Counts) -> tuple[float, float]:
        """Return the prompt tokens a second that these replicas compute together, and the rows that they decode."""
        counted = self._counted(counts)
        part = GROUP_EFFICIENCY if sum(count for _, count in counted) > 1 else 1.0
        return (part * sum(facts.prefill_tokens_per_s * count for facts, count in counted),
                part * sum(facts.decode_rows * count for facts, count in counted))

    def _now_rate(self, demand: Demand) -> float:
        rate, rows = self._ready
        return rate * _prefill_part(demand, rows)

    def _prefill_rate(self, counts: Counts, demand: Demand) -> float:
        rate, rows = self._rates(counts)
        return rate * _prefill_part(demand, rows)

    def _ready_s(self, counts: Counts) -> float:
        return max((pool.facts.ready_s for pool, count in zip(self._pools, counts, strict=True)
                    if pool.facts is not None and self._present(pool, count) > pool.num_ready), default=0.0)


@lru_cache(maxsize=4096)
def _missing_bytes(memories: tuple[tuple[MemberMemory, int], ...], demand: MemoryDemand, min_copies: int,
                   policy: Policy) -> int:
    members = [memory for memory, count in memories for _ in range(count)]
    if not members:
        return demand.num_slots * demand.expert_bytes + demand.fixed_bytes
    return memory_fit(members, demand, min(min_copies, len(members)), policy).missing_bytes


def _prefill_part(demand: Demand, rows: float) -> float:
    """Return the part of the time that sequences that decode leave to prompts."""
    return 1.0 - min(_MOST_DECODE_PART, _over(demand.num_decoding, rows))


def _over(needed: float, there: float) -> float:
    if needed <= 0:
        return 0.0
    return needed / there if there > 0 else float("inf")
