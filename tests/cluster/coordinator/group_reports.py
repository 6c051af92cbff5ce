"""Members and reports, for tests of the coordinator's decisions."""

from __future__ import annotations

from cluster.coordinator.group_size import GroupSize, PoolSize
from cluster.coordinator.membership import GroupRules
from cluster.coordinator.reports import Report
from cluster.coordinator.view import ShardState
from cluster.planner.memory_plan import MemoryDemand
from cluster.planner.plan_rules import PlanRules
from model.args import parse_model_args
from serving.config import PlacementConfig
from serving.link.epoch import DeviceFacts, Member, ShardStatus
from tests.cluster.profiles import PROFILE

ARGS = parse_model_args({
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "vocab_size": 64,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2,
    "max_position_embeddings": 128})

DEMAND = MemoryDemand(num_moe_layers=2, num_experts=6, expert_bytes=100, shared_bytes=50, kv_cache_bytes=30,
                      buffer_bytes=20)


def member(name: str, budget: int = 1000, pool: str = "cpu") -> Member:
    facts = DeviceFacts("cpu", "test", "packed-cpu", budget, 1, resident_bytes=10)
    return Member(f"{pool}-{name}", pool, f"id-{name}", f"node-{name}", f"{name}:1", facts, f"{name}:2", PROFILE)


def status_of(one: Member, state: ShardState = ShardState.WAITING, epoch_number: int = 0,
              detail: str = "") -> ShardStatus:
    return ShardStatus(one.shard_id, epoch_number, state, detail=detail)


def report(one: Member, state: ShardState = ShardState.WAITING, epoch_number: int = 0, at_s: float = 0.0,
           detail: str = "") -> Report:
    return Report(one, status_of(one, state, epoch_number, detail), at_s)


def rules(num_members: int = 3, config: PlacementConfig | None = None) -> GroupRules:
    of_each = PoolSize(num_members, num_members, num_members)
    size = GroupSize({"gpu": of_each, "cpu": of_each}, 30.0, num_members)
    return GroupRules(size, PlanRules(ARGS, DEMAND, 2, 64, config or PlacementConfig()),
                      lost_after_s=10.0, replaced_after_s=6.0)
