"""A device gets the kernels of its kind."""

from __future__ import annotations

import logging

import pytest
import torch

from model.kernels.packed_cpu import PackedCpuKernels
from model.kernels.select import select_kernels
from model.kernels.torch_kernels import TorchKernels


def test_cpu_gets_the_packed_kernels() -> None:
    assert isinstance(select_kernels("cpu"), PackedCpuKernels)


def test_a_cpu_without_a_library_gets_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(self: PackedCpuKernels) -> None:
        raise OSError("no library for this CPU")

    monkeypatch.setattr(PackedCpuKernels, "__init__", refuse)
    with caplog.at_level(logging.WARNING):
        kernels = select_kernels("cpu")
    assert isinstance(kernels, TorchKernels) and "no library for this CPU" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gets_torch() -> None:
    assert select_kernels("cuda").name == "torch-cuda"
