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
