"""A member's KV cache is made before its first group, and sized anew for every epoch beside the experts that it has."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import AsyncMock, Mock

import pytest

from cluster.planner.cache_plan import CacheSizes
from cluster.shard.held_engine import HeldEngine, hold
from cluster.shard.loaded_model import new_runner
from model.memory import expert_bytes, kv_block_bytes
from model.moe import new_experts
from model.pace import UNTIMED
from serving.config import AutoscalingConfig
from serving.link.epoch import Epoch
from tests.cluster.shard.test_loaded_model import MEMBERS, PLACEMENT, POOL, USED, Case, case, loader
from tests.placements import even_shares

__all__ = ["case", "loader"]        # fixtures


def test_experts_that_a_revision_has_taken_are_counted_when_they_come_back(case: Case) -> None:
    model, args = case.model, case.model.decoder.args
    sizes = CacheSizes(1, 0)
    runner = new_runner(model, sizes, case.config.scheduler.block_size, UNTIMED)
    held = HeldEngine(model, case.config, sizes, UNTIMED, USED - model.decoder.weights_bytes, runner)
    budget = case.budget(20 * held.block_bytes, above=3 * expert_bytes(args, 4))
    members = tuple(replace(one, facts=replace(one.facts, memory_budget_bytes=budget)) for one in MEMBERS)
    epoch = Epoch(2, members, PLACEMENT, "", even_shares(2))
    before = held.blocks_in(POOL, epoch, 0)
    experts = model.decoder.experts[0]
    three, experts.weights = experts.weights, new_experts(args, 1, model.decoder.kernels, model.decoder.dtype)
    # The one that is left may exist twice while the placement changes, not three.
    reserved = three.nbytes - experts.weights.nbytes
    assert held.blocks_in(POOL, epoch, 0) == before + reserved // held.block_bytes


def test_nobody_waits_for_caches_in_a_group(case: Case) -> None:
    block_bytes = kv_block_bytes(case.model.decoder.args, case.config.scheduler.block_size, 4)
    budget = case.budget(20 * block_bytes, above=3 * expert_bytes(case.model.decoder.args, 4))
    members = tuple(replace(one, facts=replace(one.facts, memory_budget_bytes=budget)) for one in MEMBERS)
    held = hold(case.config, POOL, case.model, Epoch(1, members, PLACEMENT, "", even_shares(2)), 0)
    assert held.runner.dispatcher is None and held.engine is None
    assert held.caches.nbytes == held.sizes.num_blocks * block_bytes > 0
    fewer = held.sizes.num_blocks - 1
    held.resize(fewer)              # another epoch came before the group had formed
    assert held.caches.nbytes == fewer * block_bytes


@pytest.mark.parametrize("goals", [None, AutoscalingConfig(itl_slo_s=0.1)], ids=["without", "with"])
def test_prompts_are_bounded_where_tokens_have_an_slo(case: Case, goals: AutoscalingConfig | None) -> None:
    config, sizes = case.config.model_copy(update={"autoscaling": goals}), CacheSizes(4, 0)
    runner = new_runner(case.model, sizes, config.scheduler.block_size, UNTIMED)
    held = HeldEngine(case.model, config, sizes, UNTIMED, USED, runner)
    engine = held.enter(1, Mock(prepared_revision=0), AsyncMock(), Mock())
    assert (engine.scheduler.prefill_budget is not None) == (goals is not None)
