"""Chooses the kernels that a device gets."""

from __future__ import annotations

import logging

from model.kernels.protocol import Kernels
from model.kernels.torch_kernels import TorchKernels

logger = logging.getLogger(__name__)


def select_kernels(device: str) -> Kernels:
    """Return PackedCpuKernels on "cpu" when its library loads here, else TorchKernels ("cuda", "cuda:1", other
    CPUs)."""
    if device != "cpu":
        return TorchKernels(device)
    try:
        from model.kernels.packed_cpu import PackedCpuKernels
        return PackedCpuKernels()
    except (ImportError, OSError) as error:
        logger.warning("packed_kernels_unavailable fallback=torch why=%s", error)
        return TorchKernels("cpu")
