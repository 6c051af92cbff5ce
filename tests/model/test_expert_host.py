"""A member that has experts and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.args import read_model_args
from model.dispatch.dispatcher import LocalDispatcher
from model.errors import TensorError
from model.expert_host import ExpertHost
from model.kernels.packed_cpu import PackedCpuKernels
from model.kernels.protocol import Kernels
from model.kernels.torch_kernels import TorchExperts, TorchKernels
from model.memory import expert_bytes
from model.placement import Placement
from model.runner import Runner
from model.step import ScheduledRequest, StepPlan
from model.weights import LoadReport, WeightLoader

WriteTiny = Callable[..., Path]
TWO = Placement(2, (((0,), (1,), (0, 1), (1,)),))


def load(folder: Path, placement: Placement = TWO, rank: int = 1,
         kernels: Kernels | None = None) -> tuple[ExpertHost, LoadReport]:
    loader = WeightLoader(folder, read_model_args(folder), torch.float32, kernels or TorchKernels())
    return loader.load_expert_host(placement, rank)


def test_it_reads_and_holds_its_experts_only(write_tiny: WriteTiny) -> None:
    folder = write_tiny()
    host, report = load(folder)
    whole, _ = WeightLoader(folder, host.args, torch.float32, TorchKernels()).load_decoder(TWO, 1)
    assert report.bytes_read == report.weights_bytes == host.weights_bytes == 3 * expert_bytes(host.args, 4)
    ours, theirs = host.experts[0].weights, whole.experts[0].weights
    assert isinstance(ours, TorchExperts) and isinstance(theirs, TorchExperts)
    assert torch.equal(ours.gate_up_EiD, theirs.gate_up_EiD) and torch.equal(ours.down_EDI, theirs.down_EDI)


@pytest.mark.parametrize("kernels", [TorchKernels(), PackedCpuKernels(2)], ids=["torch", "packed"])
def test_it_takes_part_in_a_step_without_a_kv_cache(write_tiny: WriteTiny, kernels: Kernels) -> None:
    alone = Placement(1, (((0,),) * 4,))
    host, _ = load(write_tiny(), alone, 0, kernels)
    runner = Runner(host, LocalDispatcher(kernels, alone), num_blocks=0, block_size=4)
    assert runner.caches.nbytes == 0
    result = runner.execute(StepPlan(1, 7, ()), (0,))
    assert (result.step_index, result.tokens, result.stats.expert_rows) == (7, (), ((0, 0, 0, 0),))
    with pytest.raises(ValueError, match="0 blocks"):
        runner.execute(StepPlan(1, 8, (ScheduledRequest("r", (1,), 0, (0,)),)), (1,))


def test_it_computes_no_rows_of_its_own(write_tiny: WriteTiny) -> None:
    host, _ = load(write_tiny())
    with pytest.raises(ValueError, match="2 rows for a member that has experts only"):
        host.logits(torch.empty(2, 32))
    assert host.logits(torch.empty(0, 32)).shape == (0, 64)


def test_wrong_and_missing_experts_are_named(write_tiny: WriteTiny) -> None:
    gone, odd = (f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (0, 3))
    with pytest.raises(TensorError, match=f"misses 1 tensors: {gone}"):
        load(write_tiny({gone: None}))
    with pytest.raises(TensorError, match=r"experts\.3\.up_proj\.weight is \[3, 3\]"):
        load(write_tiny({odd: torch.ones(3, 3)}))
