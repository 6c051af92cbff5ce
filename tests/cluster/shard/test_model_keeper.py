"""Weights go from one epoch to the next, and only what is missing is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from cluster.planner.memory_demand import PROCESS_GROWTH_BYTES
from cluster.shard import model_keeper
from cluster.shard.model_keeper import ModelKeeper
from model.args import read_model_args
from model.expert_host import ExpertHost
from model.kernels.torch_kernels import TorchKernels
from model.placement import Placement
from serving.config import ModelConfig, PoolConfig, ServeConfig
from serving.link.epoch import DeviceFacts, Epoch, Member, RequestShare
from tests.model.conftest import CONFIG, tiny_tensors

FACTS = DeviceFacts("cpu", "test", "test", 1 << 40, 1, resident_bytes=1000)
MEMBERS = tuple(Member(f"s{rank}", "default", "n", "node", "127.0.0.1:1", FACTS) for rank in range(2))
FIRST = Placement(2, (((0,), (0,), (0, 1), (1,)),))
OTHER = Placement(2, (((0,), (1,), (0,), (0,)),))
EXPERT_BYTES = 3 * 16 * 32 * 4          # as stored


@pytest.fixture
def keeper(tmp_path: Path) -> ModelKeeper:
    save_file(tiny_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    config = ServeConfig(model=ModelConfig(path=str(tmp_path), dtype="float32"), pools=(PoolConfig(),))
    return ModelKeeper(config, read_model_args(tmp_path), TorchKernels(), lambda line: None)


def epoch(number: int, placement: Placement, budget_bytes: int = 1 << 40, takes: bool = True) -> Epoch:
    members = tuple(replace(one, facts=replace(FACTS, memory_budget_bytes=budget_bytes)) for one in MEMBERS)
    shares = (RequestShare(0.5, 64),) * 2 if takes else (RequestShare(0.0, 0), RequestShare(1.0, 64))
    return Epoch(number, members, placement, "", shares)


def test_the_same_experts_are_kept_whatever_the_rank(keeper: ModelKeeper) -> None:
    first = keeper.take(epoch(1, FIRST), 0)
    weights = first.decoder.experts[0].weights
    mirrored = Placement(2, (((1,), (1,), (0, 1), (0,)),))
    again = keeper.take(epoch(2, mirrored), 1)
    assert again.decoder is first.decoder and again.decoder.experts[0].weights is weights
    assert (again.rank, again.placement, again.num_expert_copies) == (1, mirrored, 3)


def test_only_experts_that_are_missing_are_read(keeper: ModelKeeper) -> None:
    first = keeper.take(epoch(1, FIRST), 0)
    again = keeper.take(epoch(2, OTHER), 0)         # 0 and 2 stay, 3 comes
    assert again.decoder is first.decoder and keeper.progress == (EXPERT_BYTES, EXPERT_BYTES)


def test_where_memory_is_short_a_layer_is_given_up_before_it_is_read(keeper: ModelKeeper) -> None:
    keeper.take(epoch(1, FIRST), 0)
    keeper.take(epoch(2, OTHER, budget_bytes=0), 0)
    assert keeper.progress == (3 * EXPERT_BYTES, 3 * EXPERT_BYTES)


def test_a_member_with_another_role_loads_anew(keeper: ModelKeeper) -> None:
    first = keeper.take(epoch(1, FIRST), 0)
    host = keeper.take(epoch(2, FIRST, takes=False), 0)
    assert not isinstance(first.decoder, ExpertHost) and isinstance(host.decoder, ExpertHost)


def test_what_a_process_has_grown_by_counts_in_the_next_plan(keeper: ModelKeeper,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    weights_bytes = keeper.take(epoch(1, FIRST), 0).decoder.weights_bytes
    for grown_bytes, found in ((0, 1000), (PROCESS_GROWTH_BYTES, 1000), (PROCESS_GROWTH_BYTES + 70, 1070)):
        monkeypatch.setattr(model_keeper, "resident_memory_bytes", lambda grown=grown_bytes: (
            1000 + weights_bytes + grown))
        assert keeper.release_engine(FACTS).resident_bytes == found
    assert keeper.release_engine(replace(FACTS, device="cuda:0")).resident_bytes == 1000
