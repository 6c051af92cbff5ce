"""TorchKernels against formulas written out, and rows that do not depend on their batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.kernels.protocol import AttentionBatch
from model.kernels.torch_attention import attend_with_sdpa
from model.kernels.torch_kernels import TorchKernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])]


@pytest.fixture(params=DEVICES)
def kernels(request: pytest.FixtureRequest) -> TorchKernels:
    return TorchKernels(request.param)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def randn(kernels: TorchKernels, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: (torch.randn(*shape, generator=generator) * 0.5).to(dtype).to(kernels.device)


def assert_near(ours: Tensor, exact: Tensor) -> None:
    tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[ours.dtype]
    torch.testing.assert_close(ours.float(), exact.float(), atol=tolerance, rtol=tolerance)


def test_linear(kernels: TorchKernels, dtype: torch.dtype, randn: Callable[..., Tensor]) -> None:
    weight_NK, bias_N, x_TK = randn(70, 33), randn(70), randn(5, 33)
    weight = kernels.new_linear(70, 33, dtype)
    weight.load_rows(0, weight_NK[:20])
    weight.load_rows(20, weight_NK[20:])
    exact = x_TK.double() @ weight_NK.double().T
    assert_near(kernels.linear(x_TK, weight), exact)
    assert_near(kernels.linear(x_TK, weight, bias_N), exact + bias_N.double())
    wide = kernels.linear(x_TK, weight, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, exact.float(), atol=1e-4, rtol=1e-4)
    assert kernels.linear(x_TK[:0], weight).shape == (0, 70)
    assert weight.nbytes == 70 * 33 * dtype.itemsize


def test_experts(kernels: TorchKernels, dtype: torch.dtype, randn: Callable[..., Tensor]) -> None:
    experts = kernels.new_experts(3, 10, 16, dtype)
    weights = [(randn(10, 16), randn(10, 16), randn(16, 10)) for _ in range(3)]
    for slot, (gate, up, down) in enumerate(weights):
        experts.load_gate(slot, gate)
        experts.load_up(slot, up)
        experts.load_down(slot, down)
    rows_RD = randn(7, 16)
    found = kernels.experts(rows_RD, [5, 0, 2], experts)
    for rows, slot in ((slice(0, 5), 0), (slice(5, 7), 2)):
        gate, up, down = (weight.double() for weight in weights[slot])
        x = rows_RD[rows].double()
        assert_near(found[rows], (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    assert kernels.experts(rows_RD[:0], [0, 0, 0], experts).shape == (0, 16)


def test_combine(kernels: TorchKernels, randn: Callable[..., Tensor]) -> None:
    rows_RD, row_of_TK = randn(6, 8), torch.tensor([[5, 0], [2, 2]], device=kernels.device)
    weights_TK = torch.tensor([[0.25, 0.5], [0.75, 1.0]], device=kernels.device)
    exact = torch.stack([0.25 * rows_RD[5].double() + 0.5 * rows_RD[0].double(), 1.75 * rows_RD[2].double()])
    assert_near(kernels.combine(rows_RD, row_of_TK, weights_TK), exact)


def test_rms_norm(kernels: TorchKernels, randn: Callable[..., Tensor]) -> None:
    x, weight = randn(5, 3, 20), randn(20)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 0.1) * weight.double()
    assert_near(kernels.rms_norm(x, weight, 0.1), exact)


def test_rope(kernels: TorchKernels, randn: Callable[..., Tensor]) -> None:
    x_THd = randn(3, 2, 4)
    angles = torch.rand(3, 2, device=kernels.device).repeat(1, 2)
    found = kernels.rope(x_THd, angles.cos(), angles.sin())
    pairs = torch.complex(x_THd[..., :2].double(), x_THd[..., 2:].double()) * torch.polar(
        torch.ones_like(angles[:, None, :2]).double(), angles[:, None, :2].double())
    assert_near(found, torch.cat((pairs.real, pairs.imag), dim=-1))


def batch_of(lens: list[tuple[int, int]], block_size: int) -> AttentionBatch:
    """lens: (rows of this step, tokens before it) of each sequence, each with blocks of its own, in reverse order."""
    num_blocks = [-(-(rows + before) // block_size) for rows, before in lens]
    firsts = [sum(num_blocks[:i]) for i in range(len(lens))]
    tables = torch.zeros(len(lens), max(num_blocks), dtype=torch.int32)
    positions, slots = [], []
    for i, (rows, before) in enumerate(lens):
        tables[i, :num_blocks[i]] = torch.arange(firsts[i] + num_blocks[i] - 1, firsts[i] - 1, -1)
        positions += range(before, before + rows)
        slots += [int(tables[i, p // block_size]) * block_size + p % block_size for p in range(before, before + rows)]
    starts = torch.tensor([0] + [rows for rows, _ in lens]).cumsum(0)
    return AttentionBatch(starts.int(), torch.tensor([sum(pair) for pair in lens]).int(), tables,
                          torch.tensor(positions).int(), torch.tensor(slots))


@pytest.mark.parametrize("window", [None, 1, 20])
def test_attention_over_cached_keys(kernels: TorchKernels, dtype: torch.dtype, randn: Callable[..., Tensor],
                                    window: int | None) -> None:
    """Chunks, decodes and whole prompts in one step; keys of earlier steps come from the cache."""
    lens = [(1, 40), (5, 30), (50, 0), (1, 0), (70, 77)]
    cache = kernels.new_kv_cache(1, 64, 8, 2, 16, dtype)[0]
    keys = [randn(rows + before, 2, 16) for rows, before in lens]
    values = [randn(rows + before, 2, 16) for rows, before in lens]
    batch = batch_of(lens, 8)
    for i, (_, before) in enumerate(lens):
        slots = [int(batch.block_tables_SM[i, p // 8]) * 8 + p % 8 for p in range(before)]
        earlier = replace(batch, slots_T=torch.tensor(slots, dtype=torch.int64))
        kernels.write_kv(cache, keys[i][:before], values[i][:before], earlier)
    kernels.write_kv(cache, torch.cat([k[before:] for k, (_, before) in zip(keys, lens, strict=True)]),
                     torch.cat([v[before:] for v, (_, before) in zip(values, lens, strict=True)]), batch)
    q_THd = randn(sum(rows for rows, _ in lens), 4, 16)
    exact, first = [], 0
    for k, v, (rows, before) in zip(keys, values, lens, strict=True):
        exact.append(exact_attention(q_THd[first:first + rows], k, v, before, window))
        first += rows
    assert_near(kernels.attention(q_THd, cache, batch, 0.3, window), torch.cat(exact))
    assert_near(attend_with_sdpa(q_THd, cache, batch, 0.3, window), torch.cat(exact))      # CUDA's, on any device


def exact_attention(q_nHd: Tensor, k_PGd: Tensor, v_PGd: Tensor, before: int, window: int | None) -> Tensor:
    k, v = (x.double().repeat_interleave(2, dim=1) for x in (k_PGd, v_PGd))
    scores = torch.einsum("nhd,phd->hnp", q_nHd.double(), k) * 0.3
    query, key = torch.arange(before, before + q_nHd.shape[0])[:, None], torch.arange(k.shape[0])
    visible = (key <= query) & (key > query - (window or 10_000))
    weights = scores.masked_fill(~visible.to(scores.device), float("-inf")).softmax(-1)
    return torch.einsum("hnp,phd->nhd", weights, v)


@pytest.mark.parametrize("sizes", [(512, 96), (1024, 128), (72, 40), (33, 17)])
def test_rows_do_not_depend_on_their_batch_on_cpu(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """ARCHITECTURE.md: GEMMs whose row result does not depend on the number of rows, measured by a test."""
    kernels, (width, inner) = TorchKernels(), sizes
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    linear, experts = kernels.new_linear(inner, width, dtype), kernels.new_experts(1, inner, width, dtype)
    linear.load_rows(0, randn(inner, width))
    experts.load_gate(0, randn(inner, width))
    experts.load_up(0, randn(inner, width))
    experts.load_down(0, randn(width, inner))
    x_TK, weight_D = randn(133, width), randn(width)

    def results(first: int, last: int) -> list[Tensor]:
        x = x_TK[first:last]
        return [kernels.linear(x, linear), kernels.linear(x, linear, out_dtype=torch.float32),
                kernels.experts(x, [last - first], experts), kernels.rms_norm(x, weight_D, 1e-6)]

    whole = results(0, 133)
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 11), (20, 29), (40, 54), (60, 133), (132, 133)):
        for part, expected in zip(results(first, last), whole, strict=True):
            assert torch.equal(part, expected[first:last])
