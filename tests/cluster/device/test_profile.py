"""A device's profile: measured, kept, found again; noisy when its repeats differ; slower when a speed is emulated."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.device import profile as device_profile
from cluster.device.profile import emulated, measure_until_steady, profile_device, profile_facts, spread_of
from cluster.device.profile_store import ProfileStore
from cluster.planner.costs.profile_check import profile_fault
from model import device_probe, probe_work
from model.args import ModelArgs, parse_model_args
from model.device_probe import Timings
from model.kernels.torch_kernels import TorchKernels
from serving.config import PoolConfig
from tests.cluster.profiles import PROFILE

KERNELS = TorchKernels("cpu")
POOL = PoolConfig(num_threads=1)


@pytest.fixture
def args() -> ModelArgs:
    return parse_model_args({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "float32", "vocab_size": 64,
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2})


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProfileStore:
    monkeypatch.setattr(device_probe, "_POINT_S", 0.0)
    monkeypatch.setattr(probe_work, "_MAX_GROUPS", 2)
    monkeypatch.setattr(probe_work, "_MAX_LAYERS", 2)
    return ProfileStore(tmp_path)


class OnTwoThreads(TorchKernels):
    num_threads = 2


def forbid_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> None:
        raise AssertionError("measured again")
    monkeypatch.setattr(device_profile, "_measure", measure)


def count_measuring(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []

    def measure(args: ModelArgs, dtype: str, kernels: object, earlier: Timings) -> object:
        calls.append(dtype)
        return PROFILE, {}
    monkeypatch.setattr(device_profile, "_measure", measure)
    return calls


def test_a_tiny_model_is_measured_once_and_found_again(args: ModelArgs, store: ProfileStore,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    profile = profile_device(args, "float32", KERNELS, POOL, store)
    assert profile_fault(profile) is None
    assert profile.source == "measured" and profile.emulated_speed is None and profile.link is None
    assert [rows for rows, _ in profile.gemm_flop_per_s] == [rows for rows, _ in profile.expert_s]
    store.write(profile_facts(args, "float32", KERNELS), replace(profile, is_noisy=False))
    forbid_measuring(monkeypatch)
    assert profile_device(args, "float32", KERNELS, POOL, store) == replace(profile, is_noisy=False)


def test_emulation_is_the_pools_and_not_kept(args: ModelArgs, store: ProfileStore,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_measuring(monkeypatch)
    slow = profile_device(args, "float32", KERNELS, PoolConfig(num_threads=1, emulated_speed=0.25), store)
    assert slow == emulated(PROFILE, 0.25)
    assert profile_device(args, "float32", KERNELS, POOL, store) == PROFILE
    assert len(calls) == 1


def test_times_are_longer_and_rates_lower_where_a_speed_is_emulated() -> None:
    slow = emulated(PROFILE, 0.25)
    assert slow.emulated_speed == 0.25 and slow.read_bytes_per_s == PROFILE.read_bytes_per_s / 4
    for name in ("expert_s", "dense_s", "head_s"):
        assert getattr(slow, name) == tuple((rows, 4 * seconds) for rows, seconds in getattr(PROFILE, name))
    assert slow.gemm_flop_per_s == tuple((rows, rate / 4) for rows, rate in PROFILE.gemm_flop_per_s)
    assert slow.attention_s == 4 * PROFILE.attention_s and slow.layer_overhead_s == 4 * PROFILE.layer_overhead_s
    assert emulated(PROFILE, None) is PROFILE


@pytest.mark.parametrize("change", [
    {"hidden_size": 64}, {"num_experts_per_tok": 1}, {"vocab_size": 65}, {"moe_layers": (1,)}, {"sliding_window": 8}])
def test_another_shape_is_another_profile(args: ModelArgs, store: ProfileStore, monkeypatch: pytest.MonkeyPatch,
                                          change: dict[str, object]) -> None:
    calls = count_measuring(monkeypatch)
    profile_device(args, "float32", KERNELS, POOL, store)
    profile_device(replace(args, **change), "float32", KERNELS, POOL, store)     # type: ignore[arg-type]
    profile_device(args, "bfloat16", KERNELS, POOL, store)
    profile_device(args, "float32", OnTwoThreads("cpu"), POOL, store)
    assert calls == ["float32", "float32", "bfloat16", "float32"]


def test_a_broken_file_and_a_noisy_profile_are_measured_again(args: ModelArgs, store: ProfileStore,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_measuring(monkeypatch)
    facts = profile_facts(args, "float32", KERNELS)
    store.write(facts, replace(PROFILE, is_noisy=True, spread=0.2))
    assert profile_device(args, "float32", KERNELS, POOL, store).is_noisy and not calls     # a start takes it
    assert profile_device(args, "float32", KERNELS, POOL, store, settles=True) == PROFILE and len(calls) == 1
    store.path_of(facts).write_text("{")
    assert profile_device(args, "float32", KERNELS, POOL, store) == PROFILE and len(calls) == 2
    found = store.read(facts)
    assert found is not None and found.profile == PROFILE


def test_what_another_shard_measured_meanwhile_is_taken_even_if_noisy(args: ModelArgs, store: ProfileStore,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_measuring(monkeypatch)
    noisy = replace(PROFILE, is_noisy=True, spread=0.2)
    original = store.lock

    @contextlib.contextmanager
    def lock(timeout_s: float) -> Iterator[None]:
        store.write(profile_facts(args, "float32", KERNELS), noisy)      # by the one that had the lock before
        with original(timeout_s):
            yield
    monkeypatch.setattr(store, "lock", lock)
    assert profile_device(args, "float32", KERNELS, POOL, store) == noisy


def passes(*seconds: float) -> Callable[[], Timings]:
    left = iter(seconds)
    return lambda: {("experts", 1): next(left), ("idle layers", 0): 1e-6}


def test_two_passes_that_agree_are_enough() -> None:
    steady = measure_until_steady(passes(0.100, 0.102), lambda: 0.0, budget_s=1.0)
    assert steady.num_passes == 2 and steady.spread == pytest.approx(0.02)
    assert steady.timings["experts", 1] == 0.100


def test_passes_are_added_until_the_two_fastest_agree() -> None:
    steady = measure_until_steady(passes(0.150, 0.100, 0.120, 0.101), lambda: 0.0, budget_s=1.0)
    assert steady.num_passes == 4 and steady.spread == pytest.approx(0.01)


def test_a_pass_that_agrees_with_an_earlier_start_is_enough() -> None:
    earlier = {("experts", 1): 0.101, ("idle layers", 0): 1e-6}
    steady = measure_until_steady(passes(0.100), lambda: 0.0, budget_s=1.0, earlier=earlier)
    assert steady.num_passes == 2 and steady.timings["experts", 1] == 0.100 and steady.spread == pytest.approx(0.01)


def test_a_noisy_machine_settles_over_its_starts(args: ModelArgs, store: ProfileStore,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A start's measurement is in the file, and the next one goes on from it."""
    monkeypatch.setattr(device_profile, "_BUDGET_S", 0.0)
    monkeypatch.setattr(device_profile, "MAX_SPREAD", -1.0)
    assert profile_device(args, "float32", KERNELS, POOL, store).is_noisy
    first = store.read(profile_facts(args, "float32", KERNELS))
    profile_device(args, "float32", KERNELS, POOL, store, settles=True)
    second = store.read(profile_facts(args, "float32", KERNELS))
    assert first is not None and second is not None
    earlier = {(what, rows): seconds for what, rows, seconds in first.timings}
    assert earlier and all(seconds <= earlier[what, rows] for what, rows, seconds in second.timings)


def test_a_noisy_machine_uses_up_its_time_and_no_more() -> None:
    now = iter((0.0, 2.0, 3.0))         # each pass takes a second
    steady = measure_until_steady(passes(0.1, 0.2, 0.3), lambda: next(now), budget_s=3.5)
    assert steady.num_passes == 3 and steady.spread == pytest.approx(1.0)
    assert steady.spread > device_profile.MAX_SPREAD


def test_short_calls_and_wake_ups_weigh_less_in_the_spread() -> None:
    assert spread_of([{("a", 1): 1e-6}, {("a", 1): 2e-6}]) == pytest.approx(0.02)
    assert spread_of([{("a", 1): 1e-3}, {("a", 1): 2e-3}]) == pytest.approx(1.0)
    assert spread_of([{("layers", 1): 1e-3}, {("layers", 1): 2e-3}]) == pytest.approx(0.25)
    assert spread_of([{("a", 1): 1.0, ("a", 4): 2.0}, {("a", 1): 1.0}]) == 0.0


def test_noise_is_said(args: ModelArgs, store: ProfileStore, monkeypatch: pytest.MonkeyPatch,
                       caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(device_profile, "spread_of", lambda passes: 0.5)
    monkeypatch.setattr(device_profile, "_BUDGET_S", 0.0)
    with caplog.at_level(logging.WARNING):
        profile = profile_device(args, "float32", KERNELS, POOL, store)
    assert profile.is_noisy and profile.spread == 0.5 and "profile_noisy spread=0.500" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_has_a_profile(args: ModelArgs, store: ProfileStore) -> None:
    profile = profile_device(args, "bfloat16", TorchKernels("cuda:0"), PoolConfig(device="cuda"), store)
    assert profile_fault(profile) is None
