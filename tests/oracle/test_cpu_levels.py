"""Every kernel library that this CPU runs gives the same bits, whatever the numbers.

Letters as in model/kernels/protocol.py
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.kernels import packed_cpu_library
from model.kernels.packed_cpu import PackedCpuKernels
from model.kernels.packed_cpu_library import cpu_levels, library_path
from model.kernels.protocol import AttentionBatch, DeltaNetGates

pytestmark = pytest.mark.skipif(library_path() is None, reason="no packed kernels for this CPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGEST = {torch.float32: 3e38, torch.bfloat16: 3e38, torch.float16: 6e4}
LEAST = {torch.float32: 1e-38, torch.bfloat16: 1e-38, torch.float16: 6e-5}
SPECIAL = {"normal": (), "denormal": (1e-39, -1e-39, 1e-20, -3e-20, 1e-38), "zero": (0.0, -0.0), "nan": (float("nan"),),
           "infinite": (float("inf"), -float("inf"), 1.0)}


@pytest.fixture(scope="module")
def levels() -> dict[str, PackedCpuKernels]:
    found: dict[str, PackedCpuKernels] = {}
    with pytest.MonkeyPatch.context() as patch:
        for level in cpu_levels(platform.machine(), Path("/proc/cpuinfo").read_text(encoding="utf-8")):
            path = Path(packed_cpu_library.__file__).with_name(f"packed_cpu.{level}.so")
            patch.setattr(packed_cpu_library, "library_path", lambda path=path: path)
            found[level] = PackedCpuKernels(2)
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_levels_agree(outs: dict[str, Tensor]) -> None:
    (first, expected), *others = outs.items()
    for level, out in others:
        assert same_bits(out, expected), f"{level} and {first} differ in {int((out != expected).sum())} numbers"


def numbers(kind: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return random numbers, a third of them of this kind; `huge` and `tiny` ones have products beyond fp32's range."""
    x, chosen = torch.randn(shape), torch.rand(shape) < 0.3
    if kind == "huge":
        x = x * LARGEST[dtype] ** 0.5
    elif kind == "tiny":
        x = x * LEAST[dtype] ** 0.5
    elif SPECIAL[kind]:
        some = torch.tensor(SPECIAL[kind])[torch.randint(len(SPECIAL[kind]), shape)]
        x = torch.where(chosen, some, x * (1e-19 if kind == "denormal" else 1.0))
    return x.to(dtype)


KINDS = [*SPECIAL, "huge", "tiny"]
ROWS_N_K = [(1, 1, 1), (2, 17, 3), (1, 64, 512), (5, 96, 1025), (64, 200, 255), (250, 80, 640), (13, 48, 34)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_linear(levels: dict[str, PackedCpuKernels], kind: str, dtype: torch.dtype) -> None:
    for num_rows, out_features, in_features in ROWS_N_K:
        weight_NK, x_TK = numbers(kind, dtype, out_features, in_features), numbers(kind, dtype, num_rows, in_features)
        for out_dtype in {dtype, torch.float32}:
            outs = {}
            for level, kernels in levels.items():
                weight = kernels.new_linear(out_features, in_features, dtype)
                weight.load_rows(0, weight_NK)
                outs[level] = kernels.linear(x_TK, weight, weight_NK[:, 0].contiguous(), out_dtype)
            assert_levels_agree(outs)


def test_denormals_are_zeros(levels: dict[str, PackedCpuKernels]) -> None:
    """As VDPBF16PS has it: of inputs, and of what the chain comes to on the way."""
    x_TK = torch.tensor([[1e-39, 0.0], [1e-20, 0.0], [2e-19, 1e-19], [1.0, 1e-19]]).bfloat16()
    for kernels in levels.values():
        weight = kernels.new_linear(1, 2, torch.bfloat16)
        weight.load_rows(0, torch.tensor([[1e-19, -2e-19]]).bfloat16())
        out_T1 = kernels.linear(x_TK, weight, out_dtype=torch.float32)
        assert out_T1.flatten().tolist()[:3] == [0.0, 0.0, 0.0] and out_T1[3] > 0
    assert torch.tensor(1e-39) / 2 > 0, "the caller's own arithmetic keeps its denormals"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_experts(levels: dict[str, PackedCpuKernels], kind: str, dtype: torch.dtype) -> None:
    for hidden, intermediate in ((96, 64), (51, 23), (1, 1)):
        gate, up = (numbers(kind, dtype, 4, intermediate, hidden) for _ in range(2))
        down = numbers(kind, dtype, 4, hidden, intermediate)
        rows_RD, outs = numbers("normal", dtype, 150, hidden), {}
        for level, kernels in levels.items():
            weights = kernels.new_experts(4, intermediate, hidden, dtype)
            for slot in range(4):
                weights.load_gate(slot, gate[slot])
                weights.load_up(slot, up[slot])
                weights.load_down(slot, down[slot])
            outs[level] = kernels.experts(rows_RD, [1, 0, 130, 19], weights)
        assert_levels_agree(outs)


def attention_batches(lens: list[int], block_size: int) -> Iterator[AttentionBatch]:
    """Yield two steps: sequences without their last rows, and those rows."""
    blocks = [-(-length // block_size) for length in lens]
    starts = [0, *itertools.accumulate(blocks)]
    tables = torch.zeros(len(lens), max(blocks), dtype=torch.int32)
    for seq, count in enumerate(blocks):
        tables[seq, :count] = torch.arange(starts[seq], starts[seq] + count)
    for begin, end in ((0, 2), (2, 0)):
        spans = [(0 if end else length - begin, length - end) for length in lens]
        counts = torch.tensor([0, *itertools.accumulate(last - first for first, last in spans)])
        positions = torch.cat([torch.arange(first, last) for first, last in spans])
        slots = torch.cat([tables[seq, torch.arange(first, last) // block_size].long() * block_size
                           + torch.arange(first, last) % block_size for seq, (first, last) in enumerate(spans)])
        context_lens = torch.tensor([last for _, last in spans]).int()
        yield AttentionBatch(counts.int(), context_lens, tables, positions.int(), slots)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_attention(levels: dict[str, PackedCpuKernels], kind: str, dtype: torch.dtype) -> None:
    for heads, kv_heads, head_dim, block_size in ((4, 2, 64, 16), (6, 1, 19, 4), (2, 2, 1, 32)):
        batches = list(attention_batches([70, 3, 131], block_size))
        steps = [[numbers(kind, dtype, len(batch.slots_T), some, head_dim) for some in (heads, kv_heads, kv_heads)]
                 for batch in batches]
        outs = {}
        for level, kernels in levels.items():
            cache, rows = kernels.new_kv_cache(1, 60, block_size, kv_heads, head_dim, dtype)[0], []
            for batch, (q_THd, k_TGd, v_TGd) in zip(batches, steps, strict=True):
                kernels.write_kv(cache, k_TGd, v_TGd, batch)
                rows.append(kernels.attention(q_THd, cache, batch, head_dim ** -0.5, 40 if heads == 6 else None))
            outs[level] = torch.cat(rows)
        assert_levels_agree(outs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_delta_net(levels: dict[str, PackedCpuKernels], kind: str, dtype: torch.dtype) -> None:
    none, slots = torch.empty(0, dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    batch = AttentionBatch(torch.tensor([0, 1, 30]).int(), none, none, none, none.long(),
                           state_reads_S=slots[:2].clone(), state_writes_S=slots[2:].clone())
    for key_heads, heads, key_dim, value_dim in ((1, 2, 16, 64), (2, 4, 7, 19), (1, 1, 1, 1)):
        width = 2 * key_heads * key_dim + heads * value_dim
        x_TC, weight_KC = numbers(kind, dtype, 30, width), numbers(kind, dtype, 4, width)
        ba_TJ, gates = numbers("normal", dtype, 30, 2 * heads), DeltaNetGates(-torch.rand(heads), torch.randn(heads))
        recurrent = numbers(kind, torch.float32, 4, heads, key_dim, value_dim)
        outs = {}
        for level, kernels in levels.items():
            state = kernels.new_delta_net_states(1, 4, heads, key_dim, value_dim, 4, width, dtype)[0]
            state.recurrent_NHkv.copy_(recurrent)
            conv = kernels.causal_conv(x_TC, weight_KC, state, batch)
            rule = kernels.gated_delta_rule(x_TC, ba_TJ, gates, state, batch)
            parts = (conv, rule, state.recurrent_NHkv.nan_to_num(7.0))
            outs[level] = torch.cat([part.float().flatten() for part in parts])
        assert_levels_agree(outs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows(levels: dict[str, PackedCpuKernels], kind: str, dtype: torch.dtype) -> None:
    x_THd, gate_THd = numbers(kind, dtype, 9, 3, 50), numbers(kind, dtype, 9, 3, 50)
    row_of, weights = torch.randint(9, (5, 3)), numbers(kind, torch.float32, 5, 3)
    cos_Td, sin_Td = numbers("normal", torch.float32, 9, 40), numbers("normal", torch.float32, 9, 40)
    assert_levels_agree({level: torch.cat([part.flatten() for part in (
        kernels.rms_norm(x_THd, gate_THd[0, 0], 1e-6), kernels.gated_rms_norm(x_THd, gate_THd, gate_THd[0, 0], 1e-6),
        kernels.times_sigmoid(x_THd[:, 0], gate_THd[:, 0]), kernels.rope(x_THd, cos_Td, sin_Td),
        kernels.combine(x_THd[:, 0], row_of, weights))]) for level, kernels in levels.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gate_and_norm_of_a_sum(levels: dict[str, PackedCpuKernels], kind: str, dtype: torch.dtype) -> None:
    x_TD, weight_ND, delta_TD = numbers(kind, dtype, 40, 33), numbers(kind, dtype, 50, 33), numbers(kind, dtype, 40, 33)
    outs = {}
    for level, kernels in levels.items():
        gate = kernels.new_linear(50, 33, dtype)
        gate.load_rows(0, weight_ND)
        parts = [*kernels.choose_experts(x_TD, gate, 7, True, True),
                 *kernels.add_rms_norm(x_TD.clone(), delta_TD, weight_ND[0], 1e-6)]
        outs[level] = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])
    assert_levels_agree(outs)
