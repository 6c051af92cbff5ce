"""Members and reports, for tests of the coordinator's decisions."""

from __future__ import annotations

from cluster.membership import GroupRules, Report, ShardState
from cluster.memory_plan import MemoryDemand
from serving.epoch import DeviceFacts, Member, ShardStatus

DEMAND = MemoryDemand(num_moe_layers=2, num_experts=6, expert_bytes=100, shared_bytes=50, kv_cache_bytes=30,
                      buffer_bytes=20)


def member(name: str, budget: int = 1000, pool: str = "cpu") -> Member:
    facts = DeviceFacts("cpu", "test", "packed-cpu", 10_000, budget, 1, resident_bytes=10)
    return Member(f"{pool}-{name}", pool, f"id-{name}", f"node-{name}", f"{name}:1", facts, f"{name}:2")


def status_of(one: Member, state: ShardState = ShardState.WAITING, epoch: int = 0, detail: str = "") -> ShardStatus:
    return ShardStatus(one.shard_id, epoch, state, detail=detail)


def report(one: Member, state: ShardState = ShardState.WAITING, epoch: int = 0, at_s: float = 0.0,
           detail: str = "") -> Report:
    return Report(one, status_of(one, state, epoch, detail), at_s)


def rules(num_members: int = 3, demand: MemoryDemand = DEMAND) -> GroupRules:
    return GroupRules(num_members, ("gpu", "cpu"), demand, lost_after_s=10.0)
