"""Imports deepspeed, without the side effects of doing so."""

from __future__ import annotations

import contextlib
import logging
import sys
from types import ModuleType

import torch


def import_backend(device: str) -> ModuleType:
    """Return deepspeed.comm, with its logs on stderr and without the compilation of its shared-memory operator.

    The first call takes seconds: make it before it is time to join a group.
    """
    log = logging.getLogger("DeepSpeed")
    log.addFilter(_tells_news)
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed.comm
        import deepspeed.ops
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    for handler in log.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    # TorchBackend builds every operator named as compatible here. Reading the attribute runs compilers: assign it.
    deepspeed.ops.__compatible_ops__ = {}
    if torch.device(device).type == "cpu":
        set_accelerator(CPU_Accelerator())      # a CPU shard on a GPU node binds no GPU
    comm: ModuleType = deepspeed.comm
    return comm


def import_if_used(backend: str, device: str) -> None:
    """Import deepspeed where `group.backend` can need it on such a device: with "auto", CPU members never do."""
    if backend != "auto" or torch.device(device).type != "cpu":
        import_backend(device)


def _tells_news(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()
