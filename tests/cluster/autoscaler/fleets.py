"""Fleets for tests: pools of a model of 10,000 bytes of experts, whose replicas have room for half of them or more."""

from __future__ import annotations

from cluster.autoscaler.capability import ScalingRules
from cluster.autoscaler.fleet import FleetSnapshot, PoolState, ReplicaFacts, Work
from cluster.planner.memory_plan import MemberMemory, MemoryDemand

DEMAND = MemoryDemand(num_moe_layers=5, num_experts=20, expert_bytes=100, shared_bytes=1000, kv_cache_bytes=500,
                      buffer_bytes=200)
RULES = ScalingRules(ttft_slo_s=4.0, itl_slo_s=0.1, keep_alive_s=30.0, idle_timeout_s=None, demand=DEMAND,
                     min_copies=1, kv_token_bytes=1.0)


def facts(speed: float = 1.0, ready_s: float = 2.0, experts_bytes: int = 5000) -> ReplicaFacts:
    """Say of a replica of speed 1 that it computes 1,000 prompt tokens a second, or decodes 20 sequences in time."""
    memory = MemberMemory("node", DEMAND.fixed_bytes + experts_bytes + 50, 50)
    return ReplicaFacts(1000.0 * speed, 20.0 * speed, memory, ready_s)


def pool(name: str = "a", wanted: int = 2, least: int = 1, most: int = 8, ready: int | None = None,
         of: ReplicaFacts | None = None, cost: float = 1.0) -> PoolState:
    return PoolState(name, least, most, wanted, wanted if ready is None else ready, of or facts(), cost)


def fleet(*pools: PoolState, work: Work | None = None) -> FleetSnapshot:
    return FleetSnapshot(pools or (pool(),), work or Work())
