"""Each value times the factor of its block."""

from __future__ import annotations

import pytest
import torch

from model.fp8 import dequantize


@pytest.mark.parametrize(("shape", "block_size"), [((6, 9), (2, 3)), ((7, 10), (3, 4)), ((2, 2), (128, 128)),
                                                   ((5, 1), (1, 1)), ((1, 130), (128, 128))])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_matches_a_loop_over_elements(shape: tuple[int, int], block_size: tuple[int, int],
                                      factor_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(shape, generator=generator) * 50).to(torch.float8_e4m3fn)
    blocks = tuple(-(-size // side) for size, side in zip(shape, block_size, strict=True))
    factors = torch.rand(blocks, generator=generator).to(factor_dtype)
    found, before = dequantize(stored, factors, block_size), stored.clone()
    assert found.dtype is torch.float32 and torch.equal(stored.view(torch.uint8), before.view(torch.uint8))
    for row in range(shape[0]):
        for column in range(shape[1]):
            exact = stored[row, column].float() * factors[row // block_size[0], column // block_size[1]].float()
            assert found[row, column] == exact


def test_every_value_of_fp8_is_known() -> None:
    stored = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    found = dequantize(stored, torch.full((1, 2), 0.5), (128, 128))[0]
    assert found.isnan().nonzero().flatten().tolist() == [127, 255] and found[126] == 224.0 and found[1] == 2.0 ** -10


def test_matches_transformers() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(64, 96, generator=generator) * 50).to(torch.float8_e4m3fn)
    factors = torch.rand(4, 3, generator=generator)
    theirs = Fp8Dequantize(None)._dequantize_one(stored, factors, torch.float32)
    assert torch.equal(dequantize(stored, factors, (16, 32)), theirs)
