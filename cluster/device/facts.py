"""Measures this shard's device, where the shard runs."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from pathlib import Path

import psutil

from cluster.device.host_limits import host_cpus, host_memory
from serving.config import ConfigError, PoolConfig
from serving.link.epoch import DeviceFacts

# Without a memory_budget: the part of what is free when the shard starts.
_DEFAULT_PART = {"cpu": 0.5, "cuda": 0.9}


def measure_device(pool: PoolConfig, kernels_name: str, num_shards_a_machine: int) -> DeviceFacts:
    """Call it when everything is imported: the resident memory counts as what the process takes without weights.

    Raises ConfigError when the node cannot give what the pool says.
    """
    if pool.device == "cuda":
        return _measure_cuda(pool, kernels_name)
    resident_bytes = resident_memory_bytes()
    memory = host_memory()
    budget_bytes = memory_budget(pool, memory.available_bytes, resident_bytes, num_shards_a_machine)
    if budget_bytes > memory.total_bytes:
        raise ConfigError(f"pool {pool.name}: memory_budget is {budget_bytes / 2**30:.2f} GiB, but this node lets a "
                          f"process have {memory.total_bytes / 2**30:.2f} GiB "
                          f"({memory.limited_by or 'all its memory'})",
                          fix="lower memory_budget, or give the container more memory")
    return DeviceFacts(device="cpu", device_name=device_name("cpu"), kernels=kernels_name,
                       memory_budget_bytes=budget_bytes, num_threads=num_threads_of(pool),
                       resident_bytes=resident_bytes)


def memory_budget(pool: PoolConfig, available_bytes: int, resident_bytes: int, num_shards_a_machine: int = 1) -> int:
    """Return what a shard of the pool may use: what its config says, else a part of what is free when it starts.

    `resident_bytes`: of its process before it loads anything; 0 on an accelerator.
    """
    part = _DEFAULT_PART[pool.device] / num_shards_a_machine
    return pool.memory_budget or resident_bytes + int(available_bytes * part)


def available_memory_bytes() -> int:
    """Return the main memory that new programs can have here without swapping, in this container if it is one."""
    return host_memory().available_bytes


def num_threads_of(pool: PoolConfig) -> int:
    """Return the threads of a shard of the pool: as many as it says, else one for each of its CPUs that are here."""
    return pool.num_threads or max(1, min(int(pool.num_cpus), host_cpus().num_cpus))


def resident_memory_bytes() -> int:
    """Return what this process has in main memory, shared libraries included: the strictest of the usual measures.

    Weights are read into private memory, not mapped, so the page cache of the checkpoint does not count here.
    """
    return int(psutil.Process().memory_info().rss)


def used_memory_bytes(device: str) -> int:
    """Return what this process takes of the memory that its budget is about."""
    if device == "cpu":
        return resident_memory_bytes()
    import torch

    return torch.cuda.memory_reserved(device)


def return_free_memory() -> None:
    """Give memory that was freed back to the system, cycles included, where the C library can (glibc).

    Looking for cycles can keep every other thread from running for tenths of a second.
    """
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Give back memory but no cycles, and what torch keeps of an accelerator's memory. Other threads go on."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _measure_cuda(pool: PoolConfig, kernels_name: str) -> DeviceFacts:
    import torch

    free_bytes, _ = torch.cuda.mem_get_info(0)
    return DeviceFacts(device="cuda:0", device_name=device_name("cuda"), kernels=kernels_name,
                       memory_budget_bytes=memory_budget(pool, free_bytes, 0), num_threads=num_threads_of(pool))


def device_name(kind: str) -> str:
    """Return the name of the first device of the `kind`: "cpu" or "cuda"."""
    if kind == "cpu":
        return _cpu_name()
    import torch

    return torch.cuda.get_device_name(0)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
