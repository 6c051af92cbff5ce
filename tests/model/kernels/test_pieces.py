"""An element's result does not depend on its place in its tensor."""

from __future__ import annotations

import pytest
import torch

from model.kernels.pieces import in_pieces


@pytest.mark.parametrize("function", [torch.exp, torch.nn.functional.silu], ids=["exp", "silu"])
def test_result_does_not_depend_on_the_place(function: torch.nn.Module) -> None:
    x = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
    whole = in_pieces(function, x)
    torch.testing.assert_close(whole, function(x))
    for first, last in ((0, 1), (1, 18), (3, 40_000), (69_990, 70_001)):
        assert torch.equal(in_pieces(function, x[first:last]), whole[first:last])
    assert in_pieces(function, x[:6].view(2, 3)).shape == (2, 3)
