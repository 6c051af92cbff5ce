"""A planned part of a member's memory goes to its KV cache."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from llguidance import LLMatcher
from safetensors.torch import save_file

from cluster.planner.cache_plan import CacheSizes
from cluster.planner.memory_demand import buffer_bytes, least_cache_bytes, min_kv_cache_bytes
from cluster.shard import loaded_model
from cluster.shard.loaded_model import LoadedModel, cache_sizes, load_model, new_dispatcher, new_pace, read_grammars
from cluster.shard.process_group import ProcessGroup
from model.args import LinearAttentionArgs, read_model_args
from model.decoder import Decoder
from model.errors import OutOfMemoryError
from model.expert_host import ExpertHost
from model.kernels.torch_kernels import TorchKernels
from model.memory import expert_bytes, kv_block_bytes, state_slot_bytes
from model.pace import TimedPace
from model.placement import Placement
from model.step import SamplingSpec, ScheduledRequest
from model.weights import WeightLoader
from serving.config import ConfigError, ModelConfig, PoolConfig, ServeConfig
from serving.link.epoch import DeviceFacts, Epoch, Member, RequestShare
from tests.model.conftest import CONFIG, tiny_tensors
from tests.placements import even_shares
from tests.serving.conftest import byte_level_tokenizer

USED = 1_000_000
PLACEMENT = Placement(2, (((0,), (0,), (0, 1), (1,)),))
FACTS = DeviceFacts("cpu", "test", "test", 1, 1)
MEMBERS = tuple(Member(f"s{rank}", "default", "n", "node", "127.0.0.1:1", FACTS) for rank in range(2))
POOL = PoolConfig(memory_budget=1)      # only says that there is one: the budget is passed


@dataclass
class Case:
    model: LoadedModel
    config: ServeConfig

    def budget(self, kv_cache_bytes: int, above: int = 0) -> int:
        buffers = buffer_bytes(self.model.decoder.args, self.config, 2)
        return USED + buffers + kv_cache_bytes + above

    def num_blocks(self, budget_bytes: int, num_members: int = 2) -> int:
        return cache_sizes(self.config, POOL, self.model, budget_bytes, num_members).num_blocks


@pytest.fixture
def loader(tmp_path: Path) -> WeightLoader:
    save_file(tiny_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return WeightLoader(tmp_path, read_model_args(tmp_path), torch.float32, TorchKernels())


@pytest.fixture
def case(loader: WeightLoader, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(loaded_model, "used_memory_bytes", lambda device: USED)
    config = ServeConfig(model=ModelConfig(path=".", dtype="float32"), pools=(POOL,))
    epoch = Epoch(1, MEMBERS, PLACEMENT, "", even_shares(2))
    return Case(load_model(loader, epoch, 0, lambda done, total: None), config)


def test_the_experts_of_one_layer_can_exist_twice_beside_the_kv_cache(case: Case) -> None:
    args = case.model.decoder.args
    reserve = 3 * expert_bytes(args, 4)
    assert case.model.change_reserve_bytes == reserve
    block_bytes = kv_block_bytes(args, case.config.scheduler.block_size, 4)
    wanted = min_kv_cache_bytes(args, case.config) + 20 * block_bytes
    assert case.num_blocks(case.budget(wanted, above=reserve)) == wanted // block_bytes
    assert case.num_blocks(case.budget(wanted, above=reserve - 1)) == wanted // block_bytes - 1
    assert case.num_blocks(case.budget(wanted), num_members=1) >= wanted // block_bytes    # nowhere to move


def test_where_memory_is_short_serving_comes_before_changing(case: Case) -> None:
    args = case.model.decoder.args
    least = min_kv_cache_bytes(args, case.config)
    block_bytes = kv_block_bytes(args, case.config.scheduler.block_size, 4)
    assert case.num_blocks(case.budget(least)) == least // block_bytes
    with pytest.raises(OutOfMemoryError, match="for the KV cache"):
        case.num_blocks(USED)


def test_a_cache_without_room_for_the_states_of_one_sequence_says_how_many_bytes_are_missing(
        case: Case) -> None:
    linear = LinearAttentionArgs(2, 4, 16, 16, 4)
    args = replace(case.model.decoder.args, linear_layers=(0,), linear=linear)
    needed = least_cache_bytes(args, case.config)
    assert needed > 3 * state_slot_bytes(args, 4) > 3 * 4 * 4 * 16 * 16
    hybrid = replace(case.model, decoder=cast(Decoder, SimpleNamespace(
        args=args, kernels=case.model.decoder.kernels, experts=())))
    budget = 10**12
    def sizes_with(kv_cache: int) -> CacheSizes:
        pool = POOL.model_copy(update={"kv_cache": kv_cache})
        return cache_sizes(case.config.model_copy(update={"pools": (pool,)}), pool, hybrid, budget, 1)

    with pytest.raises(ConfigError, match=rf"take {needed}: 1 bytes are missing"):
        sizes_with(needed - 1)
    sizes = sizes_with(needed)
    assert (sizes.num_blocks, sizes.num_state_slots) == (1, 3)
    with pytest.raises(OutOfMemoryError, match="for the KV cache and states.* bytes are missing"):
        cache_sizes(case.config, POOL, hybrid, USED, 1)


def test_a_member_with_experts_only_has_no_kv_cache(case: Case, loader: WeightLoader) -> None:
    shares = (RequestShare(0.0, 0), RequestShare(1.0, 64))
    epoch = Epoch(1, MEMBERS, PLACEMENT, "", shares)
    model = load_model(loader, epoch, 0, lambda done, total: None)
    assert isinstance(model.decoder, ExpertHost) and not model.takes_requests
    assert replace(case, model=model).num_blocks(budget_bytes=0) == 0


def test_after_a_change_of_the_placement_it_is_known_what_is_held(case: Case) -> None:
    placement = Placement(2, (((1,), (0,), (1,), (1,)),))
    model = case.model.placed(placement, rank=1)
    assert (case.model.num_expert_copies, model.num_expert_copies) == (3, 3)
    assert (model.placement, model.rank) == (placement, 1)


def test_a_member_alone_on_a_cpu_times_its_work_and_that_for_experts(case: Case) -> None:
    kernels, alone = case.model.decoder.kernels, cast(ProcessGroup, SimpleNamespace(num_members=1))
    pace = new_pace(MEMBERS[0], kernels)
    assert isinstance(pace, TimedPace) and pace.speed == 1.0
    dispatcher = new_dispatcher(kernels, Placement(1, (((0,),) * 4,)), alone, case.config, pace)
    pace.begin_step()
    rows_RD, handle = dispatcher.dispatch(0, torch.ones(3, 8), torch.tensor([[0, 1]] * 3))
    dispatcher.combine(0, rows_RD, torch.ones(3, 2), handle)
    pace.settle()
    assert 0 < pace.experts_work_s[0] < pace.work_s and len(pace.experts_work_s) == 1


def test_who_takes_requests_reads_the_checkpoints_tokenizer_for_grammars(case: Case) -> None:
    model = replace(case.model, takes_requests=True)
    folder = model.loader.checkpoint_dir
    assert read_grammars(model) is None         # there is no tokenizer: free text is served all the same
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    grammar = str(LLMatcher.grammar_from_regex("[!-9]+"))
    grammars = read_grammars(model)
    assert grammars is not None and read_grammars(replace(model, takes_requests=False)) is None
    request = ScheduledRequest("a", (1,), 0, (0,), SamplingSpec(grammar=grammar))
    grammars.begin([request])
    assert grammars.mask(request).is_allowed_V.shape == (model.decoder.args.vocab_size,)
