"""The probe of a tiny model: what it times is there, in order, and scaled to the real shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import device_probe, probe_work
from model.args import ModelArgs, parse_model_args, read_model_args
from model.device_probe import OTHERS_ROWS, ROWS, DeviceProbe, DeviceTimes, Timings
from model.kernels.protocol import Kernels
from model.kernels.select import select_kernels
from model.kernels.torch_kernels import TorchKernels


@pytest.fixture
def args(write_tiny: Callable[..., Path]) -> ModelArgs:
    return read_model_args(write_tiny())


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_probe, "_POINT_S", 0.0)
    monkeypatch.setattr(probe_work, "_MAX_GROUPS", 2)
    monkeypatch.setattr(probe_work, "_MAX_LAYERS", 3)


def check(times: DeviceTimes) -> None:
    for curve in (times.expert_s, times.dense_s, times.head_s):
        rows, seconds = [point[0] for point in curve], [point[1] for point in curve]
        assert rows == sorted(set(rows)) and rows[0] == 1 and set(rows) <= set(ROWS) and len(rows) >= 3
        assert all(0 < some < 10 for some in seconds) and seconds == sorted(seconds)
    assert 0 <= times.attention_s < 1e-3
    assert 0 < times.layer_overhead_s < 1.0 and 0 <= times.pair_s < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [TorchKernels("cpu"), select_kernels("cpu", 1)], ids=lambda kernels: kernels.name)
def test_every_figure_of_a_tiny_model_is_finite_and_ascends(args: ModelArgs, kernels: Kernels,
                                                            dtype: torch.dtype) -> None:
    probe = DeviceProbe(args, dtype, kernels)
    timings = probe.measure()
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in timings.values())
    check(probe.times(timings))


@pytest.mark.parametrize("changes", [
    {"moe_layers": (), "num_experts": 0, "num_experts_per_tok": 0}, {"sliding_window": 8},
    {"qkv_bias": True, "out_bias": True},
    {"moe_layers": (0, 1)}])
def test_other_shapes_are_measured_too(args: ModelArgs, changes: dict[str, object]) -> None:
    probe = DeviceProbe(replace(args, **changes), torch.float32, TorchKernels("cpu"))     # type: ignore[arg-type]
    check(probe.times(probe.measure()))


@pytest.mark.parametrize("kernels", [TorchKernels("cpu"), select_kernels("cpu", 1)], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_next", "qwen3_5_moe_text"])
def test_shared_experts_and_linear_layers_are_measured_too(kernels: Kernels, family: str) -> None:
    args = parse_model_args({
        "model_type": family, "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "vocab_size": 64, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
        "num_experts": 4, "num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 12})
    probe = DeviceProbe(args, torch.bfloat16, kernels)
    timings = probe.measure()
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in timings.values())
    check(probe.times(timings))
    kinds = {type(layer.mixer).__name__ for layer in probe._layers._all}
    assert kinds == ({"PagedAttention"} if family == "qwen2_moe" else {"PagedAttention", "GatedDeltaNet"})


def test_a_curve_ends_before_its_calls_take_too_long(args: ModelArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_probe, "_MAX_CALL_S", 0.0)
    times = DeviceProbe(args, torch.float32, TorchKernels("cpu"))
    measured = times.times(times.measure())
    assert [rows for rows, _ in measured.expert_s] == [1, 4, 16]


def fixed_timings(probe: DeviceProbe, seconds: float) -> Timings:
    points = [(what, rows) for what in ("experts", "layers", "head") for rows in ROWS]
    points += [("no rows", 0), ("layers for others", 1), ("layers for others", OTHERS_ROWS)]
    return dict.fromkeys([*points, ("attention", 1), ("attention", probe._layers.context_tokens)], seconds)


def test_what_is_measured_narrower_is_scaled_up(args: ModelArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    large = replace(args, moe_intermediate_size=640, vocab_size=1280)
    monkeypatch.setattr(probe_work, "_NARROW_BYTES", 1)         # then 64 wide
    probe = DeviceProbe(large, torch.float32, TorchKernels("cpu"))
    times = probe.times(fixed_timings(probe, 1.0) | {("no rows", 0): 0.25, ("layers for others", 1): 1.0})
    assert dict(times.head_s)[4] == pytest.approx(20.0)
    assert dict(times.expert_s)[4] == pytest.approx(0.75 * 10 / probe._experts.num_experts)


def test_each_second_of_a_layer_is_counted_once(args: ModelArgs) -> None:
    """A member with 16 rows of its own, all of whose pairs it computes itself: overhead + dense + pairs = the layer."""
    probe = DeviceProbe(args, torch.float32, TorchKernels("cpu"))
    others = {("no rows", 0): 0.1, ("layers for others", 1): 0.2, ("layers for others", OTHERS_ROWS): 0.3}
    layers = {("layers", rows): 1.0 + rows / 32 for rows in ROWS}
    times = probe.times(fixed_timings(probe, 1.0) | others | layers)
    num_layers, pairs_per_row = probe._layers.num_layers(16), args.num_experts_per_tok
    assert times.layer_overhead_s == pytest.approx(0.2 / num_layers)
    assert times.pair_s == pytest.approx(0.1 / num_layers / (pairs_per_row * (OTHERS_ROWS - 1)))
    whole_s = times.layer_overhead_s + dict(times.dense_s)[16] + 16 * pairs_per_row * times.pair_s
    assert whole_s == pytest.approx(1.5 / num_layers)
    compute_s = dict(times.expert_s)[16] - 16 * times.pair_s
    assert compute_s == pytest.approx(0.9 / probe._experts.num_experts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_is_measured(args: ModelArgs) -> None:
    probe = DeviceProbe(args, torch.bfloat16, TorchKernels("cuda:0"))
    check(probe.times(probe.measure()))
