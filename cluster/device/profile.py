"""Profiles this device with this model: measured here, kept on disk, made slower where a pool emulates a speed."""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cluster.device.facts import device_name, return_free_memory
from cluster.device.profile_store import Facts, ProfileStore
from cluster.planner.costs.device_curves import scaled
from model.args import ModelArgs
from model.curve import Curve
from model.device_probe import WAKING, DeviceProbe, DeviceTimes, Timings
from model.kernels.protocol import Kernels
from model.memory import expert_bytes
from serving.config import PoolConfig
from serving.link.epoch import DeviceProfile

logger = logging.getLogger(__name__)

MAX_SPREAD = 0.03           # repeats that differ by more make a profile noisy
_BUDGET_S = 4.0             # for repeats, until they agree
_LOCK_TIMEOUT_S = 30.0
_SHORT_S = 50e-6            # of calls shorter than this, the clock and the cache decide the difference
_WAKING_WEIGHT = 0.25       # in the spread, of points that also measure how a thread wakes up
_METHOD = 7                 # raise it when what is measured changes: older files are then measured again


def profile_device(args: ModelArgs, dtype: str, kernels: Kernels, pool: PoolConfig, store: ProfileStore,
                   settles: bool = False) -> DeviceProfile:
    """Return this device's profile for this model: from the store, or measured now in a few seconds.

    Call it on the thread that will compute, on which the kernels were selected. With `settles` a noisy profile of
    before is measured again, and is steady when the repeats of both agree; without, it is taken as it is: a start does
    not wait for a quieter machine.
    """
    facts = profile_facts(args, dtype, kernels)
    began_s = time.time()
    stored = store.read(facts)
    if stored is None or (settles and stored.profile.is_noisy):
        with store.lock(_LOCK_TIMEOUT_S):
            stored = store.read(facts)
            if stored is None or (settles and stored.profile.is_noisy and stored.measured_at_s < began_s):
                earlier = {(what, rows): seconds for what, rows, seconds in stored.timings} if stored else {}
                measured, timings = _measure(args, dtype, kernels, earlier)
                store.write(facts, measured, tuple((*point, seconds) for point, seconds in timings.items()))
                return emulated(measured, pool.emulated_speed)
    return emulated(stored.profile, pool.emulated_speed)


def profile_facts(args: ModelArgs, dtype: str, kernels: Kernels) -> Facts:
    """Return all that the figures depend on."""
    return {
        "method": _METHOD, "version": importlib.metadata.version("moesaic"), "torch": torch.__version__,
        "device": device_name(kernels.device.type), "kernels": kernels.name, "num_threads": kernels.num_threads,
        "dtype": dtype,
        **{name: getattr(args, name) for name in (
            "vocab_size", "hidden_size", "num_layers", "num_moe_layers", "num_heads", "num_kv_heads", "head_dim",
            "intermediate_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok", "qk_norm",
            "qkv_bias", "out_bias", "sliding_window", "shared_expert_size", "gated_attention")},
        "linear": str((args.linear, args.linear_layers)) if args.linear_layers else None}


def emulated(profile: DeviceProfile, speed: float | None) -> DeviceProfile:
    """Return the profile of the same device, were all it computes so much slower. The link stays as it is."""
    if speed is None:
        return profile
    return replace(
        profile, read_bytes_per_s=profile.read_bytes_per_s * speed,
        gemm_flop_per_s=tuple((rows, rate * speed) for rows, rate in profile.gemm_flop_per_s),
        expert_s=scaled(profile.expert_s, 1 / speed), dense_s=scaled(profile.dense_s, 1 / speed),
        head_s=scaled(profile.head_s, 1 / speed), attention_s=profile.attention_s / speed,
        layer_overhead_s=profile.layer_overhead_s / speed, emulated_speed=speed)


@dataclass(frozen=True, slots=True)
class SteadyTimings:
    """The fastest of all passes, and how far the two fastest of a point lie apart at most."""

    timings: Timings
    spread: float
    num_passes: int


def measure_until_steady(measure: Callable[[], Timings], clock: Callable[[], float], budget_s: float,
                         earlier: Timings | None = None) -> SteadyTimings:
    """Measure at least two passes; more while their spread is above MAX_SPREAD and another one fits into the budget.

    earlier: what passes of another start found, counts as one.
    """
    began_s = clock()
    passes, num_made = [earlier] if earlier else [], 0
    while len(passes) < 2 or spread_of(passes) > MAX_SPREAD:
        if len(passes) >= 2 and (clock() - began_s) * (num_made + 1) / num_made > budget_s:
            break
        passes.append(measure())
        num_made += 1
    shared = [point for point in passes[0] if all(point in timings for timings in passes)]
    return SteadyTimings({point: min(timings[point] for timings in passes) for point in shared}, spread_of(passes),
                         len(passes))


def spread_of(passes: list[Timings]) -> float:
    """Return the largest relative difference between a point's two fastest passes, with short ones counted as _SHORT_S,
    and less of it for points that wake up in between."""
    spread = 0.0
    for point in passes[0]:
        seconds = sorted(timings[point] for timings in passes if point in timings)
        if len(seconds) > 1:
            weight = _WAKING_WEIGHT if point[0] in WAKING else 1.0
            spread = max(spread, weight * (seconds[1] - seconds[0]) / max(seconds[0], _SHORT_S))
    return spread


def _measure(args: ModelArgs, dtype: str, kernels: Kernels, earlier: Timings) -> tuple[DeviceProfile, Timings]:
    began_s = time.perf_counter()
    torch_dtype: torch.dtype = getattr(torch, dtype)
    probe = DeviceProbe(args, torch_dtype, kernels)
    steady = measure_until_steady(probe.measure, time.perf_counter, _BUDGET_S - (time.perf_counter() - began_s),
                                  earlier)
    times = probe.times(steady.timings)
    del probe
    return_free_memory()
    profile = _profile(args, torch_dtype.itemsize, times, steady.spread)
    if profile.is_noisy:
        logger.warning("profile_noisy spread=%.3f passes=%d", steady.spread, steady.num_passes)
    logger.info("device_profiled read_gb_per_s=%.1f gflop_per_s=%.0f spread=%.3f passes=%d took_s=%.2f",
                profile.read_bytes_per_s / 1e9, profile.gemm_flop_per_s[-1][1] / 1e9, steady.spread, steady.num_passes,
                time.perf_counter() - began_s)
    return profile, steady.timings


def _profile(args: ModelArgs, dtype_bytes: int, times: DeviceTimes, spread: float) -> DeviceProfile:
    num_bytes = expert_bytes(args, dtype_bytes) or 3 * args.hidden_size * args.intermediate_size * dtype_bytes
    flop = 2 * num_bytes // dtype_bytes     # of a row
    computed: Curve = tuple((rows, seconds - rows * times.pair_s) for rows, seconds in times.expert_s)
    rates: Curve = tuple((rows, rows * flop / max(seconds, 1e-9)) for rows, seconds in computed)
    return DeviceProfile(
        source="measured", read_bytes_per_s=num_bytes / max(computed[0][1], 1e-9), gemm_flop_per_s=rates,
        expert_s=times.expert_s, dense_s=times.dense_s, head_s=times.head_s, attention_s=times.attention_s,
        layer_overhead_s=times.layer_overhead_s, spread=spread, is_noisy=spread > MAX_SPREAD)
