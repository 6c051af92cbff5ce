"""Packed CPU kernels against plain torch in fp64, and bit for bit against themselves in other company.

Letters as in model/kernels/protocol.py
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from model.kernels.packed_cpu import PackedCpuKernels
from model.kernels.packed_cpu_library import library_path
from model.kernels.packed_weights import PackedExperts, PackedLinear
from model.kernels.protocol import AttentionBatch

pytestmark = pytest.mark.skipif(library_path() is None, reason="no packed kernels for this CPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}     # one rounding of the largest value


@pytest.fixture(scope="module")
def kernels() -> PackedCpuKernels:
    return PackedCpuKernels(2)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_near(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    assert ours.shape == exact.shape
    largest = exact.abs().max().clamp_min(1e-30)
    assert float((ours.double() - exact).abs().max() / largest) <= tolerance


def new_linear(kernels: PackedCpuKernels, weight_NK: Tensor) -> PackedLinear:
    weight = kernels.new_linear(*weight_NK.shape, weight_NK.dtype)
    weight.load_rows(0, weight_NK)
    return weight


def new_experts(kernels: PackedCpuKernels, gate_EID: Tensor, up_EID: Tensor, down_EDI: Tensor) -> PackedExperts:
    weights = kernels.new_experts(*gate_EID.shape, gate_EID.dtype)
    for slot in range(gate_EID.shape[0]):
        weights.load_gate(slot, gate_EID[slot])
        weights.load_up(slot, up_EID[slot])
        weights.load_down(slot, down_EDI[slot])
    return weights


def random_experts(num_experts: int, size: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((num_experts, size, hidden), (num_experts, size, hidden), (num_experts, hidden, size))
    gate, up, down = ((torch.randn(shape) * shape[2] ** -0.5).to(dtype) for shape in shapes)
    return gate, up, down


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "out_features", "in_features"), [
    (1, 64, 64), (2, 37, 33), (3, 1, 1), (5, 100, 301), (8, 72, 512), (9, 40, 257), (19, 16, 2), (121, 300, 520)])
def test_linear_matches_fp64(kernels: PackedCpuKernels, dtype: torch.dtype, num_rows: int, out_features: int,
                             in_features: int) -> None:
    weight_NK = torch.randn(out_features, in_features).to(dtype)
    x_TK = torch.randn(num_rows, in_features).to(dtype)
    bias_N = torch.randn(out_features).to(dtype)
    weight = new_linear(kernels, weight_NK)
    exact = functional.linear(x_TK.double(), weight_NK.double())
    assert_near(kernels.linear(x_TK, weight, out_dtype=torch.float32), exact, 2e-6)
    assert_near(kernels.linear(x_TK, weight), exact, TOLERANCE[dtype])
    with_bias = kernels.linear(x_TK, weight, bias_N)
    assert with_bias.dtype == dtype
    assert_near(with_bias, exact + bias_N.double(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 13])
def test_linear_is_one_fma_chain_in_ascending_k(kernels: PackedCpuKernels, dtype: torch.dtype, num_rows: int) -> None:
    """bf16 values have 8 bits, so a product is exact in fp32 and an FMA is one rounded addition, as numpy makes it."""
    weight_NK, x_TK = (torch.randn(n, 611).bfloat16() for n in (20, num_rows))
    ours_TN = kernels.linear(x_TK.to(dtype), new_linear(kernels, weight_NK.to(dtype)), out_dtype=torch.float32)
    weight, x = weight_NK.to(dtype).float().numpy(), x_TK.to(dtype).float().numpy()
    chain = numpy.zeros((num_rows, 20), dtype=numpy.float32)
    for k in range(611):
        chain += x[:, k, None] * weight[None, :, k]
    assert numpy.array_equal(ours_TN.numpy(), chain)


@settings(max_examples=40)
@given(num_rows=st.integers(0, 260), out_features=st.integers(1, 90), in_features=st.integers(1, 700),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_linear_row_does_not_depend_on_its_batch(num_rows: int, out_features: int, in_features: int,
                                                 dtype: torch.dtype, seed: int) -> None:
    kernels = PackedCpuKernels(2)
    generator = torch.Generator().manual_seed(seed)
    weight = new_linear(kernels, torch.randn(out_features, in_features, generator=generator).to(dtype))
    x_TK = torch.randn(num_rows, in_features, generator=generator).to(dtype)
    together = kernels.linear(x_TK, weight, out_dtype=torch.float32)
    for row in {0, num_rows // 2, num_rows - 1} & set(range(num_rows)):
        assert torch.equal(kernels.linear(x_TK[row:row + 1], weight, out_dtype=torch.float32)[0], together[row])
    for size in (3, 8, 11, 130):
        assert torch.equal(kernels.linear(x_TK[:size], weight, out_dtype=torch.float32), together[:size])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_does_not_depend_on_threads(kernels: PackedCpuKernels, dtype: torch.dtype) -> None:
    weight = new_linear(kernels, torch.randn(500, 300).to(dtype))
    for num_rows in (1, 8, 200):
        x_TK = torch.randn(num_rows, 300).to(dtype)
        alone = PackedCpuKernels(1).linear(x_TK, weight)
        for threads in (2, 3):
            assert torch.equal(PackedCpuKernels(threads).linear(x_TK, weight), alone)


def test_calls_run_on_other_threads_while_they_are_lent_and_give_the_same(kernels: PackedCpuKernels) -> None:
    weight, x_TK = new_linear(kernels, torch.randn(500, 300).bfloat16()), torch.randn(8, 300).bfloat16()
    alone, own = kernels.linear(x_TK, weight), kernels.num_threads
    for threads in (1, own + 3, own):
        kernels.run_on(threads)
        assert kernels.num_threads == own and torch.equal(kernels.linear(x_TK, weight), alone)


def test_callers_on_several_python_threads_get_their_own_results(kernels: PackedCpuKernels) -> None:
    weights = [new_linear(kernels, torch.randn(400, 300).bfloat16()) for _ in range(4)]
    x_TK = torch.randn(3, 300).bfloat16()
    alone = [kernels.linear(x_TK, weight) for weight in weights]

    def repeat(index: int) -> bool:
        return all(torch.equal(kernels.linear(x_TK, weights[index]), alone[index]) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


def test_linear_rounds_as_torch_does(kernels: PackedCpuKernels) -> None:
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1e-40, 3.3e38, 65519.0, 65520.0, 6e-8])
    values_TK = torch.cat([special, torch.randn(1000) * 100, torch.tensor([1.00390625, 1.01171875])]).unsqueeze(1)
    for dtype in (torch.bfloat16, torch.float16):
        x_TK = values_TK.to(dtype)
        one = new_linear(kernels, torch.ones(1, 1, dtype=dtype))
        bias = torch.full((1,), 2.0 ** -7, dtype=dtype)
        exact = x_TK.float() + bias.float()
        assert torch.equal(kernels.linear(x_TK, one, bias).nan_to_num(7.0), exact.to(dtype).nan_to_num(7.0))


def test_linear_reads_strided_rows_and_loads_by_parts(kernels: PackedCpuKernels) -> None:
    weight_NK = torch.randn(53, 40).bfloat16()
    weight = kernels.new_linear(53, 40, torch.bfloat16)
    for first, last in ((0, 5), (5, 30), (30, 31), (31, 53)):
        weight.load_rows(first, weight_NK[first:last])
    wide = torch.randn(6, 100).bfloat16()
    strided = kernels.linear(wide[:, 7:47], weight)
    assert torch.equal(strided, kernels.linear(wide[:, 7:47].contiguous(), new_linear(kernels, weight_NK)))
    assert torch.equal(kernels.linear(wide.t()[:40].t(), weight), kernels.linear(wide[:, :40], weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_give_no_rows(kernels: PackedCpuKernels, dtype: torch.dtype) -> None:
    assert kernels.linear(torch.empty(0, 8, dtype=dtype), kernels.new_linear(4, 8, dtype)).shape == (0, 4)
    experts = kernels.new_experts(3, 8, 16, dtype)
    assert kernels.experts(torch.empty(0, 16, dtype=dtype), [0, 0, 0], experts).shape == (0, 16)
    assert kernels.experts(torch.empty(0, 16, dtype=dtype), [], kernels.new_experts(0, 8, 16, dtype)).shape == (0, 16)
    no_choices = torch.empty(0, 2, dtype=torch.int64)
    assert kernels.combine(torch.empty(0, 16, dtype=dtype), no_choices, no_choices.float()).shape == (0, 16)
    assert kernels.rms_norm(torch.empty(0, 16, dtype=dtype), torch.ones(16, dtype=dtype), 1e-6).shape == (0, 16)
    assert kernels.rope(torch.empty(0, 2, 8, dtype=dtype), torch.empty(0, 8), torch.empty(0, 8)).shape == (0, 2, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "hidden"), [(32, 64), (40, 72), (17, 23), (300, 530)])
def test_experts_match_fp64(kernels: PackedCpuKernels, dtype: torch.dtype, size: int, hidden: int) -> None:
    gate, up, down = random_experts(5, size, hidden, dtype)
    num_rows_E = [3, 0, 1, 21, 130]
    rows_RD = (torch.randn(sum(num_rows_E), hidden) * 3).to(dtype)
    ours = kernels.experts(rows_RD, num_rows_E, new_experts(kernels, gate, up, down))
    exact, first = torch.empty(rows_RD.shape, dtype=torch.float64), 0
    for slot, num_rows in enumerate(num_rows_E):
        x = rows_RD[first:first + num_rows].double()
        hidden_nI = functional.silu(x @ gate[slot].double().t()) * (x @ up[slot].double().t())
        exact[first:first + num_rows] = hidden_nI @ down[slot].double().t()
        first += num_rows
    assert_near(ours, exact, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_row_does_not_depend_on_its_grouping(kernels: PackedCpuKernels, dtype: torch.dtype) -> None:
    gate, up, down = random_experts(4, 56, 90, dtype)
    weights = new_experts(kernels, gate, up, down)
    num_rows_E = [2, 140, 0, 9]
    rows_RD = torch.randn(sum(num_rows_E), 90).to(dtype)
    together = kernels.experts(rows_RD, num_rows_E, weights)
    for row in (0, 1, 2, 77, 141, 142, 150):
        slot = 0 if row < 2 else 1 if row < 142 else 3
        lonely = new_experts(kernels, *(w[slot:slot + 1] for w in (gate, up, down)))      # another holder of the expert
        assert torch.equal(kernels.experts(rows_RD[row:row + 1], [1], lonely)[0], together[row])
    for threads in (1, 2, 3):
        assert torch.equal(PackedCpuKernels(threads).experts(rows_RD, num_rows_E, weights), together)


def test_silu_is_accurate_over_its_whole_range(kernels: PackedCpuKernels) -> None:
    gates = torch.cat([torch.linspace(-86, 87, 4000), torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4, float("inf")])])
    one = torch.ones(1, 1)
    weights = new_experts(kernels, one[None], torch.zeros(1, 1, 1), one[None])
    assert torch.equal(kernels.experts(gates[:4000, None], [4000], weights), torch.zeros(4000, 1))
    weights = new_experts(kernels, torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]), torch.ones(1, 2, 1))
    rows = torch.stack([gates, torch.ones_like(gates)], dim=1)[:-1]
    ours = kernels.experts(rows, [len(rows)], weights)[:, 0].double()
    exact = functional.silu(rows[:, 0].double())
    assert torch.allclose(ours, exact, rtol=5e-7, atol=1e-33)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_adds_in_column_order_and_rounds_once(kernels: PackedCpuKernels, dtype: torch.dtype) -> None:
    rows_RD = torch.randn(30, 45).to(dtype)
    row_of_TK = torch.randint(0, 30, (7, 3))
    weights_TK = torch.rand(7, 3)
    exact = (rows_RD.double()[row_of_TK] * weights_TK.double().unsqueeze(-1)).sum(dim=1)
    ours = kernels.combine(rows_RD, row_of_TK, weights_TK)
    assert_near(ours, exact, TOLERANCE[dtype])
    for token in range(7):
        again = kernels.combine(rows_RD[row_of_TK[token]], torch.arange(3).unsqueeze(0), weights_TK[token:token + 1])
        assert torch.equal(again[0], ours[token])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_matches_fp64(kernels: PackedCpuKernels, dtype: torch.dtype) -> None:
    weight_d = torch.randn(72).to(dtype)
    for x in (torch.randn(9, 72), torch.randn(400, 3, 72) * 50, torch.randn(5, 200)[:, :72], torch.zeros(2, 72),
              torch.randn(4, 2, 300)[:, :, 10:82]):
        x = x.to(dtype)
        normed = (x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
        ours = kernels.rms_norm(x, weight_d, 1e-6)
        assert_near(ours, normed.double() * weight_d.double(), 2 * TOLERANCE[dtype])
        assert torch.equal(kernels.rms_norm(x[1:2], weight_d, 1e-6)[0], ours[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_of_norm_and_output_match_fp64(kernels: PackedCpuKernels, dtype: torch.dtype) -> None:
    wide_TN = (torch.randn(90, 4 * 72 + 9) * 20).to(dtype)
    x_THd, gate_THd = (wide_TN[:, first:first + 2 * 72].unflatten(1, (2, 72)) for first in (3, 150))
    weight_d, zero_centred_d = torch.randn(72).to(dtype), 1 + torch.randn(72)       # the latter is fp32 beside any x
    normed = x_THd.double() * torch.rsqrt(x_THd.double().square().mean(-1, keepdim=True) + 1e-6)
    ours = kernels.gated_rms_norm(x_THd, gate_THd, weight_d, 1e-6)
    assert_near(ours, normed * weight_d.double() * functional.silu(gate_THd.double()), 3 * TOLERANCE[dtype])
    assert torch.equal(kernels.gated_rms_norm(x_THd[7:8], gate_THd[7:8], weight_d, 1e-6), ours[7:8])
    assert_near(kernels.rms_norm(x_THd, zero_centred_d, 1e-6), normed * zero_centred_d.double(), 2 * TOLERANCE[dtype])
    for gate_TN in (wide_TN[:, 150:250], wide_TN[:, 7:8]):
        ours = kernels.times_sigmoid(wide_TN[:, 3:103], gate_TN)
        assert_near(ours, wide_TN[:, 3:103].double() * torch.sigmoid(gate_TN.double()), TOLERANCE[dtype])
        assert torch.equal(kernels.times_sigmoid(wide_TN[5:6, 3:103], gate_TN[5:6]), ours[5:6])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (72, 72), (128, 128), (64, 16), (75, 38), (16, 2)])
def test_rope_matches_fp64(kernels: PackedCpuKernels, dtype: torch.dtype, head_dim: int, rotary_dim: int) -> None:
    qkv = torch.randn(70, 5 * head_dim).to(dtype)
    x_THd = qkv[:, head_dim:4 * head_dim].unflatten(1, (3, head_dim))      # a view with a long step
    angles = torch.randn(70, rotary_dim) * 9
    turned = x_THd[..., :rotary_dim].double()
    first, second = turned.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    exact = turned * angles.cos().double().unsqueeze(1) + rotated * angles.sin().double().unsqueeze(1)
    ours = kernels.rope(x_THd, angles.cos(), angles.sin())
    assert_near(ours[..., :rotary_dim], exact, TOLERANCE[dtype])
    assert torch.equal(ours[..., rotary_dim:], x_THd[..., rotary_dim:])
    assert torch.equal(kernels.rope(x_THd[5:6], angles.cos()[5:6], angles.sin()[5:6])[0], ours[5])


class Sequences:
    """Keys, values and queries of some sequences, in a cache whose free blocks hold NaN. Lengths in tokens."""

    def __init__(self, kernels: PackedCpuKernels, shape: AttentionShape, lens: list[int], dtype: torch.dtype) -> None:
        self.kernels, self.shape, self.lens = kernels, shape, lens
        total = sum(lens)
        self.k_TGd, self.v_TGd = (torch.randn(total, shape.kv_heads, shape.head_dim).to(dtype) for _ in range(2))
        self.q_THd = (torch.randn(total, shape.heads, shape.head_dim) * 2).to(dtype)
        self.starts = [0, *itertools.accumulate(lens)]

    def attend(self, chunks: list[list[int]], window: int | None, block_size: int, order: list[int]) -> list[Tensor]:
        """Runs each sequence in its own chunks, one chunk of every sequence a step, sequences in the given order.
        Outputs [len, H, d] by sequence."""
        num_blocks = [-(-length // block_size) for length in self.lens]
        cache = self.kernels.new_kv_cache(2, sum(num_blocks) + 2, block_size, self.shape.kv_heads, self.shape.head_dim,
                                          self.q_THd.dtype)[1].fill_(float("nan"))
        free = torch.randperm(sum(num_blocks) + 2).tolist()
        tables = [[free.pop() for _ in range(n)] for n in num_blocks]
        outs: list[list[Tensor]] = [[] for _ in self.lens]
        for step in range(max(len(c) for c in chunks)):
            active = [s for s in order if step < len(chunks[s])]
            done = {s: sum(chunks[s][:step]) for s in active}
            rows = [self.starts[s] + done[s] + i for s in active for i in range(chunks[s][step])]
            batch = attention_batch([(done[s], chunks[s][step], tables[s]) for s in active], block_size)
            self.kernels.write_kv(cache, self.k_TGd[rows], self.v_TGd[rows], batch)
            out = self.kernels.attention(self.q_THd[rows], cache, batch, self.shape.scale, window)
            for s, part in zip(active, out.split([chunks[s][step] for s in active]), strict=True):
                outs[s].append(part)
        return [torch.cat(parts) for parts in outs]

    def exact(self, window: int | None) -> list[Tensor]:
        group = self.shape.heads // self.shape.kv_heads
        outs = []
        for first, last in itertools.pairwise(self.starts):
            q, k, v = (x[first:last].double().transpose(0, 1) for x in (self.q_THd, self.k_TGd, self.v_TGd))
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            ones = torch.ones(last - first, last - first, dtype=torch.bool)
            seen = ones.tril() if window is None else ones.tril() & ones.triu(1 - window)
            scores = (q @ k.transpose(1, 2) * self.shape.scale).masked_fill(~seen, float("-inf"))
            outs.append((scores.softmax(-1) @ v).transpose(0, 1))
        return outs


@dataclass(frozen=True)
class AttentionShape:
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def scale(self) -> float:
        return float(self.head_dim ** -0.5)


def attention_batch(sequences: list[tuple[int, int, list[int]]], block_size: int) -> AttentionBatch:
    """From (tokens done before, tokens of this step, block table) of each sequence."""
    widest = max(len(table) for _, _, table in sequences)
    positions = [p for done, length, _ in sequences for p in range(done, done + length)]
    slots = [table[p // block_size] * block_size + p % block_size
             for done, length, table in sequences for p in range(done, done + length)]
    return AttentionBatch(
        torch.tensor([0, *itertools.accumulate(length for _, length, _ in sequences)], dtype=torch.int32),
        torch.tensor([done + length for done, length, _ in sequences], dtype=torch.int32),
        torch.tensor([table + [0] * (widest - len(table)) for _, _, table in sequences], dtype=torch.int32),
        torch.tensor(positions, dtype=torch.int32), torch.tensor(slots, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [AttentionShape(8, 2, 64), AttentionShape(3, 3, 72), AttentionShape(12, 1, 128),
                                   AttentionShape(4, 2, 8), AttentionShape(70, 1, 16)], ids=str)
@pytest.mark.parametrize("window", [None, 37])
def test_attention_matches_fp64(kernels: PackedCpuKernels, dtype: torch.dtype, shape: AttentionShape,
                                window: int | None) -> None:
    sequences = Sequences(kernels, shape, [1, 150, 64, 17], dtype)
    ours = sequences.attend([[1], [150], [64], [17]], window, 16, [0, 1, 2, 3])
    for part, exact in zip(ours, sequences.exact(window), strict=True):
        assert_near(part, exact, TOLERANCE[dtype])


@settings(max_examples=25)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), window=st.sampled_from([None, 1, 20, 70]),
       shape=st.sampled_from([AttentionShape(4, 2, 40), AttentionShape(6, 1, 16), AttentionShape(2, 2, 64)]))
def test_attention_row_depends_on_what_it_sees_only(data: st.DataObject, dtype: torch.dtype, window: int | None,
                                                    shape: AttentionShape) -> None:
    """Whole or in chunks or one by one, any block size and table, any sequences beside it."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    lens = data.draw(st.lists(st.integers(1, 140), min_size=1, max_size=4))
    sequences = Sequences(PackedCpuKernels(2), shape, lens, dtype)
    whole = sequences.attend([[length] for length in lens], window, 16, list(range(len(lens))))
    chunks = [data.draw(st.integers(1, max(1, length))) for length in lens]
    split = [[chunk] * (length // chunk) + [length % chunk] * (length % chunk > 0)
             for chunk, length in zip(chunks, lens, strict=True)]
    order = data.draw(st.permutations(range(len(lens))))
    block_size = data.draw(st.sampled_from([4, 16, 32, 64]))
    again = sequences.attend(split, window, block_size, order)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_attention_does_not_depend_on_threads() -> None:
    outs = []
    for threads in (1, 2, 3):
        torch.manual_seed(0)
        sequences = Sequences(PackedCpuKernels(threads), AttentionShape(8, 2, 64), [100, 3, 200], torch.bfloat16)
        outs.append(torch.cat(sequences.attend([[100], [3], [200]], None, 16, [0, 1, 2])))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_attention_without_sequences(kernels: PackedCpuKernels) -> None:
    cache = kernels.new_kv_cache(1, 4, 16, 2, 8, torch.bfloat16)[0]
    none = torch.empty(0, dtype=torch.int32)
    batch = AttentionBatch(torch.zeros(1, dtype=torch.int32), none, none.view(0, 0), none, none.long())
    empty = torch.empty(0, 2, 8, dtype=torch.bfloat16)
    kernels.write_kv(cache, empty, empty, batch)
    assert kernels.attention(torch.empty(0, 4, 8, dtype=torch.bfloat16), cache, batch, 1.0, None).shape == (0, 4, 8)
    assert not cache.any()
