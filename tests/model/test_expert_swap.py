"""Weights for another placement, made beside those that run, or in their place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.args import read_model_args
from model.dispatch.dispatcher import LocalDispatcher
from model.errors import TensorError
from model.expert_swap import ExpertChange, change_bytes, exchange_experts, prepare_experts
from model.kernels.packed_cpu import PackedCpuKernels
from model.kernels.protocol import ExpertWeights, Kernels
from model.kernels.torch_kernels import TorchKernels
from model.memory import expert_bytes
from model.placement import Placement
from model.runner import Runner
from model.weights import WeightLoader

WriteTiny = Callable[..., Path]
BEFORE = Placement(2, (((0,), (0, 1), (1,), (1,)), ((0,), (0,), (1,), (1,))))
AFTER = Placement(2, (((1,), (0, 1), (0,), (0,)), ((0,), (0,), (1,), (1,))))
TWO_MOE_LAYERS: dict[str, object] = {"mlp_only_layers": [0], "num_hidden_layers": 3}


@pytest.fixture(params=["torch", "packed"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return TorchKernels() if request.param == "torch" else PackedCpuKernels(2)


@pytest.fixture
def folder(write_tiny: WriteTiny) -> Path:
    """Two MoE layers, the second with the tensors of the first in another order."""
    from tests.model.conftest import tiny_tensors
    added = {name.replace("layers.1.", "layers.2."): tensor.flip(0) for name, tensor in tiny_tensors().items()
             if "layers.1." in name}
    return write_tiny(added, **TWO_MOE_LAYERS)


def loader_of(folder: Path, kernels: Kernels, dtype: torch.dtype = torch.float32) -> WeightLoader:
    return WeightLoader(folder, read_model_args(folder), dtype, kernels)


def no_check() -> None:
    pass


def outputs(kernels: Kernels, weights: ExpertWeights, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the outputs of the same rows by every slot."""
    rows_RD = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [kernels.experts(rows_RD, [3 if slot == one else 0 for slot in range(weights.num_experts)], weights)
            for one in range(weights.num_experts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 1])
def test_prepared_experts_are_those_of_a_fresh_load(folder: Path, kernels: Kernels, dtype: torch.dtype,
                                                    rank: int) -> None:
    loader = loader_of(folder, kernels, dtype)
    running, _ = loader.load_decoder(BEFORE, rank)
    fresh, _ = loader.load_decoder(AFTER, rank)
    kept = running.experts[1].weights
    change = ExpertChange(BEFORE, AFTER, rank)
    prepared = prepare_experts(change, running, loader, no_check)
    assert list(prepared) == list(change.layers) == [0]         # the other layer stays as it is
    found, wanted = (outputs(kernels, weights, dtype) for weights in (prepared[0], fresh.experts[0].weights))
    assert len(found) == (3, 2)[rank] and all(map(torch.equal, found, wanted))
    assert running.experts[1].weights is kept


def test_only_what_comes_is_read(folder: Path, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loader_of(folder, kernels)
    running, _ = loader.load_decoder(BEFORE, 0)
    bytes_read: list[int] = []
    load_experts = loader.load_experts
    monkeypatch.setattr(loader, "load_experts", lambda *arguments: bytes_read.append(load_experts(*arguments)))
    prepare_experts(ExpertChange(BEFORE, AFTER, 0), running, loader, no_check)
    assert bytes_read == [2 * expert_bytes(loader.args, 4)]      # experts 2 and 3 come, 1 stays


def test_what_a_change_takes_in_memory(folder: Path) -> None:
    loader = loader_of(folder, TorchKernels())
    change = ExpertChange(BEFORE, AFTER, 0)
    assert change_bytes(change, loader) == 3 * expert_bytes(loader.args, 4) + 16 * 32 * 4
    assert change_bytes(ExpertChange(AFTER, AFTER, 0), loader) == 0
    rounded = loader_of(folder, TorchKernels(), torch.bfloat16)
    assert change_bytes(change, rounded) == 3 * expert_bytes(loader.args, 2) + 16 * 32 * (4 + 2)


def test_a_bad_tensor_is_named_and_what_runs_stays(write_tiny: WriteTiny) -> None:
    bad = torch.full((16, 32), float("nan"))
    folder = write_tiny({"model.layers.1.mlp.experts.2.up_proj.weight": bad})
    before, after = Placement(2, (((0,), (0,), (1,), (1,)),)), Placement(2, (((1,), (0,), (0,), (1,)),))
    loader = loader_of(folder, TorchKernels())
    running, _ = loader.load_decoder(before, 0)
    weights = running.experts[0].weights
    with pytest.raises(TensorError, match=r"experts\.2\.up_proj\.weight holds values that are not finite"):
        prepare_experts(ExpertChange(before, after, 0), running, loader, no_check)
    assert running.experts[0].weights is weights


@pytest.mark.parametrize("num_checks", [1, 2, 7])
def test_what_a_check_raises_ends_the_preparation(folder: Path, kernels: Kernels, num_checks: int) -> None:
    """After the copy, after the first tensor, after the last one."""
    loader = loader_of(folder, kernels)
    running, _ = loader.load_decoder(BEFORE, 0)
    checks = iter(range(1, 8))

    def check() -> None:
        if next(checks) == num_checks:
            raise InterruptedError
    with pytest.raises(InterruptedError):
        prepare_experts(ExpertChange(BEFORE, AFTER, 0), running, loader, check)


def test_the_runner_takes_them_and_gives_back_what_it_had(folder: Path, kernels: Kernels) -> None:
    alone = Placement(1, (((0,),) * 4,) * 2)
    loader = loader_of(folder, kernels)
    decoder, _ = loader.load_decoder(alone, 0)
    runner = Runner(decoder, LocalDispatcher(kernels, alone), num_blocks=4, block_size=4)
    old, new = decoder.experts[1].weights, loader.load_decoder(alone, 0)[0].experts[1].weights
    dispatcher = LocalDispatcher(kernels, alone)
    assert runner.switch(dispatcher, {1: new}) == {1: old}
    assert runner.dispatcher is dispatcher and decoder.experts[1].weights is new


@pytest.mark.parametrize("has_room", [True, False])
@pytest.mark.parametrize(("rank_before", "rank"), [(0, 0), (1, 1), (1, 0)])
def test_exchanged_experts_are_those_of_a_fresh_load(folder: Path, kernels: Kernels, rank_before: int, rank: int,
                                                     has_room: bool) -> None:
    loader = loader_of(folder, kernels)
    model, _ = loader.load_decoder(BEFORE, rank_before)
    fresh, _ = loader.load_decoder(AFTER, rank)
    kept = model.experts[1].weights
    change = ExpertChange(BEFORE, AFTER, rank, rank_before)
    bytes_read = exchange_experts(change, model, loader, lambda num_bytes: has_room, lambda done, total: None)
    num_read = sum(len(change.read_slots(layer)) if has_room else change.num_experts(layer) for layer in change.layers)
    assert bytes_read == num_read * expert_bytes(loader.args, 4)
    for mine, wanted in zip(model.experts, fresh.experts, strict=True):
        pairs = zip(outputs(kernels, mine.weights, loader.dtype), outputs(kernels, wanted.weights, loader.dtype),
                    strict=True)
        assert all(torch.equal(found, expected) for found, expected in pairs)
    assert (model.experts[1].weights is kept) is (rank == rank_before)


def test_an_exchange_asks_for_room_beside_what_it_has_yet_to_read(folder: Path) -> None:
    loader = loader_of(folder, TorchKernels())
    none_here, all_here = Placement(2, (((1,),) * 4,) * 2), Placement(2, (((0,),) * 4,) * 2)
    model, _ = loader.load_decoder(none_here, 0)
    asked: list[int] = []

    def has_room(num_bytes: int) -> bool:
        asked.append(num_bytes)
        return True
    exchange_experts(ExpertChange(none_here, all_here, 0), model, loader, has_room, lambda done, total: None)
    layer_bytes = 4 * expert_bytes(loader.args, 4)
    assert asked == [layer_bytes, 2 * layer_bytes]


def test_an_exchange_begins_with_the_layers_that_shrink(folder: Path) -> None:
    loader = loader_of(folder, TorchKernels())
    before = Placement(2, (((0,), (1,), (1,), (1,)), ((0,),) * 4))
    after = Placement(2, (((0,),) * 4, ((0,), (1,), (1,), (1,))))
    model, _ = loader.load_decoder(before, 0)
    asked: list[int] = []

    def has_room(num_bytes: int) -> bool:
        asked.append(num_bytes // expert_bytes(loader.args, 4))
        return True
    exchange_experts(ExpertChange(before, after, 0), model, loader, has_room, lambda done, total: None)
    assert asked == [1, 4]
