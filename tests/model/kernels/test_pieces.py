"""Results of elements and rows do not depend on their place in their tensor, nor on those beside them."""

from __future__ import annotations

import pytest
import torch

from model.kernels.pieces import in_pieces, linear_in_tiles


@pytest.mark.parametrize("function", [torch.exp, torch.nn.functional.silu], ids=["exp", "silu"])
def test_result_does_not_depend_on_the_place(function: torch.nn.Module) -> None:
    x = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
    whole = in_pieces(function, x)
    torch.testing.assert_close(whole, function(x))
    for first, last in ((0, 1), (1, 18), (3, 40_000), (69_990, 70_001)):
        assert torch.equal(in_pieces(function, x[first:last]), whole[first:last])
    assert in_pieces(function, x[:6].view(2, 3)).shape == (2, 3)


# Few outputs are where kernels for vectors take over; of many inputs, kernels cut the sum in places of their own.
@pytest.mark.parametrize("num_outputs", [1, 2, 5, 11, 54, 1024])
@pytest.mark.parametrize("num_inputs", [17, 18, 22, 72, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_product_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype, num_inputs: int, num_outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TK, weight_NK, bias_N = (torch.randn(*shape, generator=generator).to(dtype)
                               for shape in ((133, num_inputs), (num_outputs, num_inputs), (num_outputs,)))
    whole = linear_in_tiles(x_TK, weight_NK, bias_N)
    torch.testing.assert_close(whole.double(), x_TK.double() @ weight_NK.double().T + bias_N.double(),
                               atol=1e-3 if dtype == torch.float32 else 0.5, rtol=0.01)
    for num_rows in (0, 1, 2, 4, 8, 15, 16, 17, 33, 60, 100):
        for first in (0, 7):
            rows = slice(first, first + num_rows)
            assert torch.equal(linear_in_tiles(x_TK[rows], weight_NK, bias_N), whole[rows])
    assert torch.equal(linear_in_tiles(x_TK.t().contiguous().t(), weight_NK, bias_N), whole)
