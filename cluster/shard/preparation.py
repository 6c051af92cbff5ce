"""Prepares what registration needs: imports, facts of the checkpoint and the device, and a profile. Takes seconds."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from cluster.device.backend import import_if_used
from cluster.device.facts import measure_device, num_threads_of
from cluster.device.model_digest import model_digest
from cluster.device.model_store import locate_checkpoint
from cluster.device.profile import profile_device
from cluster.device.profile_store import ProfileStore, default_profile_dir
from model.args import ModelArgs, read_model_args
from model.kernels.protocol import Kernels
from model.kernels.select import select_kernels
from serving.config import PoolConfig, ServeConfig
from serving.link.epoch import DeviceFacts, DeviceProfile


@dataclass(frozen=True, slots=True)
class Preparation:
    kernels: Kernels
    args: ModelArgs
    profile: DeviceProfile
    facts: DeviceFacts
    digest: str                     # which model this process computes


def prepare(config: ServeConfig, pool: PoolConfig) -> Preparation:
    """Import, read and measure, on the thread that will compute. Raises CheckpointError and other ModelErrors."""
    device = "cpu" if pool.device == "cpu" else "cuda:0"
    import_if_used(config.group.backend, device)
    kernels = select_kernels(device, num_threads_of(pool))
    folder = locate_checkpoint(config.model, "facts")
    args = read_model_args(folder)
    gc.freeze()     # to look through what imports leave takes a tenth of a second each time
    profile = profile_device(args, config.model.dtype, kernels, pool, ProfileStore(default_profile_dir()))
    return Preparation(kernels, args, profile, measure_device(pool, kernels.name, config.num_shards_a_machine),
                       model_digest(config.model, folder))
