"""Choice and weights of experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.args import read_model_args
from model.gate import Gate
from model.kernels.torch_kernels import TorchKernels


@pytest.mark.parametrize("normed", [True, False])
def test_weights_and_ascending_ids(write_tiny: Callable[..., Path], normed: bool) -> None:
    gate = Gate(read_model_args(write_tiny(norm_topk_prob=normed)), TorchKernels(), torch.float32)
    gate.weight.load_rows(0, torch.eye(4, 32))
    x_TD = torch.zeros(2, 32)
    x_TD[0, :4] = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    x_TD[1, :4] = torch.log(torch.tensor([0.5, 0.1, 0.35, 0.05]))
    weights_TK, ids_TK = gate.choose(x_TD)
    assert ids_TK.tolist() == [[2, 3], [0, 2]] and ids_TK.dtype == torch.int64
    expected = torch.tensor([[0.3, 0.4], [0.5, 0.35]])
    torch.testing.assert_close(weights_TK, expected / expected.sum(1, keepdim=True) if normed else expected)


def test_rounding_of_weights_is_the_family_s(write_tiny: Callable[..., Path]) -> None:
    args = read_model_args(write_tiny())
    x_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    gate = Gate(args, TorchKernels(), torch.bfloat16)
    gate.weight.load_rows(0, torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).bfloat16())
    weights_TK, _ = gate.choose(x_TD)
    assert weights_TK.dtype == torch.float32 and torch.equal(weights_TK, weights_TK.bfloat16().float())


@pytest.mark.parametrize("num_experts_per_tok", [1, 2, 3, 8, 11])
def test_a_row_does_not_depend_on_the_others(write_tiny: Callable[..., Path], num_experts_per_tok: int) -> None:
    args = read_model_args(write_tiny(num_experts=37, num_experts_per_tok=num_experts_per_tok))
    generator = torch.Generator().manual_seed(0)
    gate = Gate(args, TorchKernels(), torch.float32)
    gate.weight.load_rows(0, torch.randn(37, 32, generator=generator))
    x_TD = torch.randn(67, 32, generator=generator)
    weights_TK, ids_TK = gate.choose(x_TD)
    for first, last in ((0, 1), (5, 7), (11, 14), (30, 67)):
        weights_nK, ids_nK = gate.choose(x_TD[first:last])
        assert torch.equal(weights_nK, weights_TK[first:last]) and torch.equal(ids_nK, ids_TK[first:last])


def test_no_rows(write_tiny: Callable[..., Path]) -> None:
    gate = Gate(read_model_args(write_tiny()), TorchKernels(), torch.float32)
    weights_TK, ids_TK = gate.choose(torch.empty(0, 32))
    assert weights_TK.shape == ids_TK.shape == (0, 2) and ids_TK.dtype == torch.int64
