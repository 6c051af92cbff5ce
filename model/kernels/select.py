"""Chooses the kernels that a device gets."""

from __future__ import annotations

import logging

import torch

from model.kernels.protocol import Kernels
from model.kernels.torch_kernels import TorchKernels

logger = logging.getLogger(__name__)


def select_kernels(device: str, num_threads: int) -> Kernels:
    """Return PackedCpuKernels on "cpu" when its library loads here, else TorchKernels ("cuda", "cuda:1", other CPUs).

    Call it on the thread that will compute: it gives torch the threads there that the kernels leave it, `num_threads`
    without and one beside packed kernels, and so on threads that begin later.
    """
    kernels = _kernels_of(device, num_threads)
    torch.set_num_threads(num_threads if isinstance(kernels, TorchKernels) else 1)
    return kernels


def _kernels_of(device: str, num_threads: int) -> Kernels:
    if device != "cpu":
        return TorchKernels(device)
    try:
        from model.kernels.packed_cpu import PackedCpuKernels
        return PackedCpuKernels(num_threads)
    except (ImportError, OSError) as error:
        logger.warning("packed_kernels_unavailable fallback=torch why=%s", error)
        return TorchKernels("cpu")
