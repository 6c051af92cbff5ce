"""Gated DeltaNet in C against plain torch, and bit for bit against itself in other company.

Letters as in model/kernels/protocol.py
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels import packed_cpu_library
from model.kernels.packed_cpu import PackedCpuKernels
from model.kernels.packed_cpu_library import library_path
from model.kernels.packed_delta_net import panel_widths, unpacked_state
from model.kernels.protocol import AttentionBatch, DeltaNetGates, DeltaNetState, Kernels
from model.kernels.torch_kernels import TorchKernels

pytestmark = pytest.mark.skipif(library_path() is None, reason="no packed kernels for this CPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}     # of the largest value
NUM_SLOTS = 12


@dataclass(frozen=True)
class Shape:
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    kernel: int = 4

    @property
    def conv_width(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim


SHAPES = [Shape(2, 4, 16, 64), Shape(1, 3, 19, 71, 3), Shape(2, 2, 8, 12, 7), Shape(1, 2, 128, 128),
          Shape(1, 1, 1, 1, 2), Shape(3, 6, 33, 100), Shape(1, 1, 256, 16, 16)]
Chunk = tuple[int, int, int | None, int]            # first row, end, slot that is read, slot that is written


@pytest.fixture(scope="module")
def kernels() -> PackedCpuKernels:
    return PackedCpuKernels(2)


class Layer:
    """Rows of some sequences, as projections leave them, and the slots of a layer, which are NaN until written."""

    def __init__(self, kernels: Kernels, shape: Shape, num_rows: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.kernels, self.shape = kernels, shape
        wide_TJ = normal(num_rows, shape.conv_width + 3 + 2 * shape.heads).to(dtype)      # views with a long step
        self.x_TC, self.ba_TJ = wide_TJ[:, :shape.conv_width], wide_TJ[:, shape.conv_width + 3:] * 2
        self.weight_KC = (normal(shape.kernel, shape.conv_width) * 0.5).to(dtype)
        self.gates = DeltaNetGates(-torch.rand(shape.heads, generator=generator) * 2, normal(shape.heads))
        self.state: DeltaNetState = kernels.new_delta_net_states(
            1, NUM_SLOTS, shape.heads, shape.key_dim, shape.value_dim, shape.kernel, shape.conv_width, dtype)[0]
        self.state.recurrent_NHkv.fill_(float("nan"))
        self.state.conv_NcC.fill_(float("nan"))

    def step(self, *chunks: Chunk, snapshots: Sequence[Sequence[tuple[int, int]]] = ()) -> Tensor:
        """Convolution and recurrence of one chunk of each sequence -> [T, H, v]."""
        rows = torch.cat([torch.arange(first, end) for first, end, _, _ in chunks])
        batch = batch_of(chunks, snapshots or [()] * len(chunks))
        qkv_TC = self.kernels.causal_conv(self.x_TC[rows], self.weight_KC, self.state, batch)
        return self.kernels.gated_delta_rule(qkv_TC, self.ba_TJ[rows], self.gates, self.state, batch)

    def recurrent_NHkv(self) -> Tensor:
        packed = isinstance(self.kernels, PackedCpuKernels)
        return unpacked_state(self.state.recurrent_NHkv) if packed else self.state.recurrent_NHkv


def batch_of(chunks: Sequence[Chunk], snapshots: Sequence[Sequence[tuple[int, int]]]) -> AttentionBatch:
    def int32(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    lens, none = [end - first for first, end, _, _ in chunks], int32([])
    kept = [pair for pairs in snapshots for pair in pairs]
    return AttentionBatch(
        int32([0, *itertools.accumulate(lens)]), none, none, none, none.long(),
        state_reads_S=int32([-1 if read is None else read for _, _, read, _ in chunks]),
        state_writes_S=int32([write for _, _, _, write in chunks]),
        snapshot_starts_S1=int32([0, *itertools.accumulate(map(len, snapshots))]),
        snapshot_rows_W=int32([row for row, _ in kept]), snapshot_slots_W=int32([slot for _, slot in kept]))


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    largest = theirs.float().abs().max().clamp_min(1e-30)
    assert float((ours.float() - theirs.float()).abs().max() / largest) <= tolerance


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_plain_torch(kernels: PackedCpuKernels, shape: Shape, dtype: torch.dtype) -> None:
    """Sequences that begin and one that goes on, longer and shorter than a convolution, with states on the way."""
    ours, theirs = (Layer(some, shape, 60, dtype) for some in (kernels, TorchKernels()))
    for layer in (ours, theirs):
        layer.state.conv_NcC[5] = torch.arange(layer.state.conv_NcC[5].numel()).view_as(layer.state.conv_NcC[5]) % 7
        layer.state.recurrent_NHkv[5] = 0.25
    chunks = ((0, 1, None, 0), (1, 34, 5, 1), (34, 36, 5, 2), (36, 60, None, 3))
    snapshots: list[Sequence[tuple[int, int]]] = [(), ((1, 6), (16, 7), (32, 8)), ((1, 9),), ()]
    assert_near(ours.step(*chunks, snapshots=snapshots), theirs.step(*chunks, snapshots=snapshots), TOLERANCE[dtype])
    written, untouched = [0, 1, 2, 3, 5, 6, 7, 8, 9], [4, 10, 11]
    assert_near(ours.recurrent_NHkv()[written], theirs.recurrent_NHkv()[written], TOLERANCE[dtype])
    assert torch.equal(ours.state.conv_NcC[written], theirs.state.conv_NcC[written])
    for state in (ours.state.recurrent_NHkv, ours.state.conv_NcC):
        assert state[untouched].isnan().all() and not state[written].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_chunk_gives_the_bits_of_its_tokens(kernels: PackedCpuKernels, shape: Shape, dtype: torch.dtype) -> None:
    layer = Layer(kernels, shape, 40, dtype)
    whole = layer.step((0, 40, None, 0))
    rows = [layer.step((row, row + 1, 1 + row % 2 if row else None, 2 - row % 2)) for row in range(40)]
    assert torch.equal(torch.cat(rows), whole)
    last = 2 - 39 % 2
    assert same_bits(layer.state.recurrent_NHkv[last], layer.state.recurrent_NHkv[0])
    assert same_bits(layer.state.conv_NcC[last], layer.state.conv_NcC[0])


@settings(max_examples=25)
@given(data=st.data(), shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES))
def test_a_row_depends_on_its_sequence_only(data: st.DataObject, shape: Shape, dtype: torch.dtype) -> None:
    """Whole or in any chunks, alone or beside others in any order, from slots anywhere."""
    lens = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
    ends = list(itertools.accumulate(lens))
    layer = Layer(PackedCpuKernels(2), shape, ends[-1], dtype, seed=data.draw(st.integers(0, 99)))
    alone = [layer.step((end - length, end, None, 0)) for length, end in zip(lens, ends, strict=True)]
    done, slots = [end - length for length, end in zip(lens, ends, strict=True)], data.draw(st.permutations(range(8)))
    outs: list[list[Tensor]] = [[] for _ in lens]
    for step in itertools.count():
        active = data.draw(st.permutations([index for index in range(len(lens)) if done[index] < ends[index]]))
        if not active:
            break
        chunks = []
        for index in active:
            first, end = done[index], data.draw(st.integers(done[index] + 1, ends[index]))
            read, write = slots[2 * index + step % 2], slots[2 * index + (step + 1) % 2]
            chunks.append((first, end, read if first > ends[index] - lens[index] else None, write))
            done[index] = end
        parts = layer.step(*chunks).split([end - first for first, end, _, _ in chunks])
        for index, part in zip(active, parts, strict=True):
            outs[index].append(part)
    assert all(torch.equal(torch.cat(out), whole) for out, whole in zip(outs, alone, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_state_kept_on_the_way_is_that_of_a_chunk_that_ends_there(kernels: PackedCpuKernels, shape: Shape) -> None:
    layer = Layer(kernels, shape, 40, torch.bfloat16)
    layer.step((0, 3, None, 9), (3, 40, None, 0), snapshots=[(), ((1, 1), (5, 2), (16, 3), (17, 4), (36, 5))])
    for num_rows, kept in ((1, 1), (5, 2), (16, 3), (17, 4), (36, 5)):
        layer.step((3, 3 + num_rows, None, 6))
        assert same_bits(layer.state.recurrent_NHkv[6], layer.state.recurrent_NHkv[kept])
        assert same_bits(layer.state.conv_NcC[6], layer.state.conv_NcC[kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    for shape in (Shape(2, 4, 64, 128), Shape(1, 3, 19, 71, 3)):
        found = []
        for threads in (1, 2, 3):
            layer = Layer(PackedCpuKernels(threads), shape, 300, dtype)
            out = layer.step((0, 250, None, 0), (250, 251, None, 1), (251, 300, None, 2))
            out = torch.cat((out, layer.step((10, 11, 0, 3), (40, 90, 1, 4))))
            found.append((out, layer.state.recurrent_NHkv[:5], layer.state.conv_NcC[:5]))
        assert all(same_bits(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


@pytest.mark.skipif(library_path() is None or "x86_64_v4" not in str(library_path()), reason="needs AVX-512")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_cpu_level_gives_the_same_bits(kernels: PackedCpuKernels, monkeypatch: pytest.MonkeyPatch, shape: Shape,
                                             dtype: torch.dtype) -> None:
    path = library_path()
    assert path is not None
    monkeypatch.setattr(packed_cpu_library, "library_path", lambda: path.with_name("packed_cpu.x86_64_v3.so"))
    wide, narrow = (Layer(some, shape, 60, dtype) for some in (kernels, PackedCpuKernels(2)))
    for chunks in (((0, 35, None, 0), (35, 60, None, 1)), ((7, 8, 0, 2), (8, 9, 1, 3), (20, 50, 0, 4))):
        assert torch.equal(wide.step(*chunks), narrow.step(*chunks))
    assert same_bits(wide.state.recurrent_NHkv[:5], narrow.state.recurrent_NHkv[:5])
    assert same_bits(wide.state.conv_NcC[:5], narrow.state.conv_NcC[:5])


def test_gates_are_accurate_over_their_whole_range(kernels: PackedCpuKernels) -> None:
    """A state of one number, first read with decay, then with beta: nothing overflows."""
    a = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([-1e4, 0.0, 1e4])])
    rate, bias = torch.tensor([-0.7]), torch.tensor([0.3])
    state = kernels.new_delta_net_states(1, 2 * len(a), 1, 1, 1, 2, 3, torch.float32)[0]
    state.recurrent_NHkv[:len(a)] = 1.0
    chunks = tuple((row, row + 1, row, len(a) + row) for row in range(len(a)))
    batch, qkv = batch_of(chunks, [()] * len(a)), torch.tensor([[1.0, 0.0, 0.0]]).repeat(len(a), 1)
    ba = torch.stack([torch.zeros_like(a), a], dim=1)
    decay = kernels.gated_delta_rule(qkv, ba, DeltaNetGates(rate, bias), state, batch)[:, 0, 0]
    exact = torch.exp(rate.double() * torch.nn.functional.softplus(a.double() + 0.3)) / (1 + 1e-6) ** 0.5
    torch.testing.assert_close(decay.double(), exact, rtol=2e-5, atol=1e-37)
    no_decay, qkv = DeltaNetGates(torch.zeros(1), bias), torch.tensor([[1.0, 1.0, 3.0]]).repeat(len(a), 1)
    state.recurrent_NHkv[:len(a)] = 0.0
    out = kernels.gated_delta_rule(qkv, ba.flip(1), no_decay, state, batch)[:, 0, 0]
    torch.testing.assert_close(out.double(), 3 * torch.sigmoid(a.double()) / (1 + 1e-6), rtol=2e-6, atol=1e-37)


def test_a_step_without_sequences(kernels: PackedCpuKernels) -> None:
    layer = Layer(kernels, SHAPES[0], 1, torch.bfloat16)
    batch = batch_of((), ())
    assert kernels.causal_conv(layer.x_TC[:0], layer.weight_KC, layer.state, batch).shape == (0, SHAPES[0].conv_width)
    out = kernels.gated_delta_rule(layer.x_TC[:0], layer.ba_TJ[:0], layer.gates, layer.state, batch)
    assert out.shape == (0, 4, 64) and layer.state.recurrent_NHkv.isnan().all()


def test_states_without_snapshots_need_no_lists_of_them(kernels: PackedCpuKernels) -> None:
    layer = Layer(kernels, SHAPES[0], 9, torch.bfloat16)
    with_lists = layer.step((0, 9, None, 0))
    batch = replace(batch_of([(0, 9, None, 1)], [()]), snapshot_starts_S1=None, snapshot_rows_W=None,
                    snapshot_slots_W=None)
    qkv_TC = kernels.causal_conv(layer.x_TC, layer.weight_KC, layer.state, batch)
    assert torch.equal(kernels.gated_delta_rule(qkv_TC, layer.ba_TJ, layer.gates, layer.state, batch), with_lists)


@pytest.mark.parametrize("value_dim", [1, 15, 16, 64, 71, 100, 128, 200])
def test_panels_hold_all_columns_once(value_dim: int) -> None:
    assert sum(panel_widths(value_dim)) == value_dim
    states = torch.arange(3 * 2 * 5 * value_dim, dtype=torch.float32).view(3, 2, 5, value_dim)
    assert sorted(unpacked_state(states).flatten().tolist()) == states.flatten().tolist()
