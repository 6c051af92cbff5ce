"""Each layer gets the cache of its kind, and the bytes are the planner's."""

from __future__ import annotations

import pytest
import torch

from model.args import parse_model_args
from model.caches import SequenceCaches
from model.kernels.protocol import Kernels
from model.kernels.select import select_kernels
from model.kernels.torch_kernels import TorchKernels
from model.memory import kv_block_bytes, state_slot_bytes

FIELDS: dict[str, object] = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16,
                             "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize("kernels", [TorchKernels(), select_kernels("cpu", 1)], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_planned(kernels: Kernels, dtype: torch.dtype) -> None:
    args = parse_model_args({"model_type": "qwen3_next", "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                             **FIELDS})
    caches = SequenceCaches(args, kernels, dtype, 10, 4, 6)
    size = dtype.itemsize
    assert caches.nbytes == 10 * kv_block_bytes(args, 4, size) + 6 * state_slot_bytes(args, size)
    assert (sorted(caches.kv_of_layer), sorted(caches.state_of_layer)) == ([3], [0, 1, 2])


def test_without_linear_layers_there_are_no_slots() -> None:
    args = parse_model_args({"model_type": "qwen3_moe", **FIELDS})
    caches = SequenceCaches(args, TorchKernels(), torch.float32, 10, 4, 6)
    assert (caches.num_state_slots, caches.states, state_slot_bytes(args, 4)) == (0, [], 0)
    assert sorted(caches.kv_of_layer) == [0, 1, 2, 3]


@pytest.mark.parametrize("kernels", [TorchKernels(), select_kernels("cpu", 1)], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("num_blocks", [300, 700])
def test_another_number_of_blocks_keeps_what_is_in_those_that_are_kept(kernels: Kernels, num_blocks: int) -> None:
    args = parse_model_args({"model_type": "qwen3_moe", **FIELDS})
    caches = SequenceCaches(args, kernels, torch.bfloat16, 600, 16, 0)
    for layer, kv in caches.kv_of_layer.items():
        numbers = torch.arange(600).view([-1 if dim == kernels.kv_block_dim else 1 for dim in range(kv.dim())])
        kv.copy_(numbers % 251 + layer)
    new_number_of = {**{block: block for block in range(280)}, **{599 - index: 280 + index for index in range(20)}}
    caches.resize(num_blocks, new_number_of)
    assert caches.num_blocks == num_blocks and caches.nbytes == num_blocks * kv_block_bytes(args, 16, 2)
    for layer, kv in caches.kv_of_layer.items():
        for old, new in new_number_of.items():
            assert kv.select(kernels.kv_block_dim, new).unique().tolist() == [float(old % 251 + layer)]


HYBRID: dict[str, object] = {**FIELDS, "model_type": "qwen3_next", "linear_num_key_heads": 2,
                             "linear_num_value_heads": 4}


def drawn_caches(kernels: Kernels, dtype: torch.dtype, num_blocks: int, seed: int) -> SequenceCaches:
    caches = SequenceCaches(parse_model_args(HYBRID), kernels, dtype, num_blocks, 16, 6)
    generator = torch.Generator().manual_seed(seed)
    tensors = [*caches.kv_of_layer.values(), *(part for state in caches.states
                                               for part in (state.recurrent_NHkv, state.conv_NcC))]
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return caches


@pytest.mark.parametrize("kernels", [TorchKernels(), select_kernels("cpu", 1)], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_and_states_go_to_other_places_bit_by_bit(kernels: Kernels, dtype: torch.dtype) -> None:
    source, target = drawn_caches(kernels, dtype, 9, 0), drawn_caches(kernels, dtype, 30, 1)
    assert source.format == target.format
    assert source.block_bytes == target.block_bytes == kv_block_bytes(parse_model_args(HYBRID), 16, dtype.itemsize)
    others = [number for number in range(30) if number not in (20, 3, 29)]
    untouched, other_states = target.read_blocks(others), [target.read_state(4, index) for index in range(3)]
    target.write_blocks((20, 3, 29), source.read_blocks((8, 0, 5)))
    for index in range(len(source.states)):
        target.write_state(2, index, source.read_state(5, index))
        assert target.read_state(2, index) == source.read_state(5, index)
        assert target.read_state(4, index) == other_states[index]
    for to, number in ((20, 8), (3, 0), (29, 5)):
        for layer, kv in target.kv_of_layer.items():
            assert torch.equal(kv.select(kernels.kv_block_dim, to),
                               source.kv_of_layer[layer].select(kernels.kv_block_dim, number))
    assert target.read_blocks(others) == untouched


def test_what_does_not_fit_is_refused() -> None:
    caches = drawn_caches(TorchKernels(), torch.float32, 4, 0)
    with pytest.raises(ValueError, match="bytes for a part"):
        caches.write_blocks((1, 2), caches.read_blocks((0,)))
    with pytest.raises(ValueError, match="bytes for a part"):
        caches.write_state(1, 0, b"")


def test_formats_tell_apart_what_would_be_read_wrongly() -> None:
    args, torch_kernels = parse_model_args(HYBRID), TorchKernels()
    formats = [SequenceCaches(args, *rest).format for rest in (
        (torch_kernels, torch.float32, 4, 16, 3), (torch_kernels, torch.bfloat16, 4, 16, 3),
        (torch_kernels, torch.float32, 4, 32, 3), (select_kernels("cpu", 1), torch.float32, 4, 16, 3))]
    assert len(set(formats)) == len(formats)
    assert SequenceCaches(args, torch_kernels, torch.float32, 7, 16, 5).format == formats[0]
