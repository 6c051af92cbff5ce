"""A device gets the kernels of its kind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model.kernels.packed_cpu import PackedCpuKernels
from model.kernels.select import select_kernels
from model.kernels.torch_kernels import TorchKernels


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_cpu_gets_the_packed_kernels() -> None:
    assert isinstance(select_kernels("cpu", 1), PackedCpuKernels)


def test_threads_belong_to_the_packed_kernels_and_torch_keeps_one_of_them() -> None:
    assert select_kernels("cpu", 3).num_threads == 3
    assert torch.get_num_threads() == 1
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 1


def test_a_cpu_without_a_library_gets_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(self: PackedCpuKernels, num_threads: int) -> None:
        raise OSError("no library for this CPU")

    monkeypatch.setattr(PackedCpuKernels, "__init__", refuse)
    with caplog.at_level(logging.WARNING):
        kernels = select_kernels("cpu", 2)
    assert isinstance(kernels, TorchKernels) and "no library for this CPU" in caplog.text
    assert kernels.num_threads == torch.get_num_threads() == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gets_torch() -> None:
    assert select_kernels("cuda", 1).name == "torch-cuda"
