"""The cost model against steps that really run: it says how far off it is."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from cluster.device.profile import profile_device
from cluster.device.profile_store import ProfileStore
from cluster.planner.costs.cost_model import predict_step
from cluster.planner.costs.step_costs import StepCosts, Workload
from model.args import ModelArgs, parse_model_args
from model.decoder import Decoder
from model.dispatch.dispatcher import LocalDispatcher
from model.kernels.select import select_kernels
from model.runner import Runner
from model.step import SamplingSpec, ScheduledRequest, StepPlan
from serving.config import PoolConfig
from serving.link.epoch import RequestShare
from tests.placements import contiguous_placement

NUM_ROWS = (1, 16, 64, 256)
NUM_STEPS = 7
MOST_OFF = 0.6          # of the measured time. Medians on an idle machine are within 0.15, and this one may be crowded


SIZES = {
    "dtype": "bfloat16", "vocab_size": 4096, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "intermediate_size": 512, "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4}
HYBRID = {
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "shared_expert_intermediate_size": 256, "num_hidden_layers": 4}


@pytest.fixture(params=[{"model_type": "qwen3_moe", "num_hidden_layers": 3}, {"model_type": "qwen3_next", **HYBRID}],
                ids=["qwen3_moe", "hybrid"])
def args(request: pytest.FixtureRequest) -> ModelArgs:
    return parse_model_args(SIZES | request.param)


def measured_s(runner: Runner, num_rows: int) -> float:
    """Return the seconds of the fastest step that decodes, in CPU time of this thread, as profiles are made of."""
    times = []
    for index in range(NUM_STEPS):
        requests = tuple(ScheduledRequest(str(row), ((row * 37 + index * 11) % 4000,), 0, (row,),
                                          SamplingSpec(temperature=0.0), state_write=row) for row in range(num_rows))
        began_s = time.thread_time()
        runner.execute(StepPlan(1, index, requests), (num_rows,))
        times.append(time.thread_time() - began_s)
    return min(times)


@torch.inference_mode()
def test_predicted_steps_are_near_the_measured_ones(args: ModelArgs, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    kernels = select_kernels("cpu", 1)
    profile = profile_device(args, "bfloat16", kernels, PoolConfig(num_threads=1), ProfileStore(tmp_path))
    decoder = Decoder(args, kernels, torch.bfloat16, (args.num_experts,) * args.num_moe_layers)
    decoder.embedding_VD.normal_()
    for layer in decoder.layers:        # zero weights would choose the same experts for every row
        weight_ED = torch.randn(args.num_experts, args.hidden_size)
        layer.mlp.gate.weight.load_rows(0, weight_ED)   # type: ignore[union-attr]
    placement = contiguous_placement(args.num_moe_layers, args.num_experts, (args.num_experts,))
    runner = Runner(decoder, LocalDispatcher(kernels, placement), max(NUM_ROWS), 16, num_state_slots=max(NUM_ROWS))
    errors = {}
    for num_rows in NUM_ROWS:
        predicted = predict_step(StepCosts(args, 2, [profile], Workload(num_rows, 1)), placement.holders, None,
                                 [RequestShare(1.0, 512)])
        measured = measured_s(runner, num_rows)
        errors[num_rows] = predicted.step_s / measured - 1.0
    with capsys.disabled():
        stated = ", ".join(f"{error:+.0%} at {num_rows} rows" for num_rows, error in errors.items())
        sys.stdout.write(f"\npredicted against measured steps: {stated}{', noisy profile' * profile.is_noisy}\n")
    assert all(abs(error) < MOST_OFF for error in errors.values()), errors
