"""A small model and members to plan it for, for tests."""

from __future__ import annotations

from cluster.planner.costs.step_costs import StepCosts, Workload
from cluster.planner.memory_plan import MemberMemory, MemoryDemand
from cluster.planner.placement_plan import PlannedMember
from model.args import ModelArgs, parse_model_args
from model.curve import Curve
from model.memory import expert_bytes, shared_bytes
from serving.link.epoch import DeviceProfile, Link

ROWS = (1, 4, 16, 64, 256)
MB = 10**6


def model_args(num_layers: int = 3, num_experts: int = 16, dense: tuple[int, ...] = ()) -> ModelArgs:
    return parse_model_args({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 1000, "hidden_size": 256,
        "intermediate_size": 1024, "num_hidden_layers": num_layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "moe_intermediate_size": 512, "num_experts": num_experts,
        "num_experts_per_tok": 2, "max_position_embeddings": 4096, "mlp_only_layers": list(dense)})


def curve(read_s: float, row_s: float) -> Curve:
    return tuple((rows, max(read_s, row_s * rows)) for rows in ROWS)


def profile(speed: float = 1.0, latency_s: float = 2e-5, bytes_per_s: float = 1e9, overhead_s: float = 1e-6,
            ) -> DeviceProfile:
    """Return that of a device `speed` times as fast as one that reads an expert in 40 us and computes 8 rows in it."""
    return DeviceProfile(
        source="data-sheet", read_bytes_per_s=2e10 * speed, gemm_flop_per_s=((64, 1e11 * speed),),
        expert_s=curve(40e-6 / speed, 5e-6 / speed), dense_s=curve(50e-6 / speed, 4e-6 / speed),
        head_s=curve(60e-6 / speed, 3e-6 / speed), attention_s=1e-9 / speed, layer_overhead_s=overhead_s,
        link=Link(latency_s, bytes_per_s))


def member(name: str, speed: float = 1.0, budget_bytes: int = 200 * MB, link_bytes_per_s: float = 1e9,
           ) -> PlannedMember:
    return PlannedMember(name, profile(speed, bytes_per_s=link_bytes_per_s), MemberMemory(name, budget_bytes, 5 * MB))


def demand(args: ModelArgs, kv_cache_bytes: int = 2 * MB) -> MemoryDemand:
    return MemoryDemand(args.num_moe_layers, args.num_experts, expert_bytes(args, 2), shared_bytes(args, 2),
                        kv_cache_bytes, buffer_bytes=3 * MB)


def budget(args: ModelArgs, num_copies: int, takes_requests: bool = True) -> int:
    """Bytes that let a member hold so many expert copies and nothing more."""
    return 5 * MB + demand(args).fixed_bytes_of(takes_requests) + num_copies * expert_bytes(args, 2)


def step_costs(*speeds: float, num_rows: int = 64, args: ModelArgs | None = None) -> StepCosts:
    return StepCosts(args or model_args(), 2, [profile(speed) for speed in speeds], Workload(num_rows, 100))
