"""A real shard goes from epoch to epoch, and takes into the next one only what it needs there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from cluster.coordinator.view import GroupPhase, ShardState, View
from model.placement import Placement
from model.step import SamplingSpec
from serving.engine.request import Submission
from serving.link.epoch import Epoch, Member, ShardStatus
from tests.model.conftest import CONFIG, tiny_tensors
from tests.placements import even_shares
from tests.process_pool import ProcessPool, free_rendezvous

JOBS = "tests.cluster.shard.shard_jobs"
WAITING = View(GroupPhase.WAITING, None, "not yet")
EXPERT_BYTES = 3 * 16 * 32 * 4          # as stored
PLACEMENT = Placement(2, (((0,), (0,), (1,), (1,)),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(tiny_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 1024}))
    return tmp_path


class LiveShards:
    """Shards in the workers 0, 1, ... of the pool."""

    def __init__(self, pool: ProcessPool, folder: Path, num_shards: int, memory_budget: int = 2 << 30) -> None:
        self.pool = pool
        self.members: list[Member] = pool.run(f"{JOBS}:start", [(folder, WAITING, memory_budget)] * num_shards)

    def call(self, method: str, *arguments: object) -> list[object]:
        """Return the result of each shard, with the same arguments."""
        return self.pool.run(f"{JOBS}:do", [(method, *arguments)] * len(self.members))

    def kill(self, index: int) -> None:
        """The last one, for the pool counts workers from the first."""
        assert index == len(self.members) - 1
        self.members.pop()
        self.pool.kill(index)
        self.pool.restart(index)

    def until(self, state: ShardState, epoch_number: int) -> list[ShardStatus]:
        return [status for _, status in self.call("until", state, epoch_number)]  # type: ignore[misc]

    def bring_up(self, number: int, placement: Placement) -> list[ShardStatus]:
        """Through one epoch's states, until all serve it."""
        epoch = Epoch(number, tuple(self.members[:placement.num_members]), placement, "",
                      even_shares(placement.num_members))
        self.call("show", View(GroupPhase.LOADING, epoch))
        self.until(ShardState.LOADED, number)
        epoch = Epoch(number, epoch.members, placement, free_rendezvous(), epoch.shares)
        self.call("show", View(GroupPhase.JOINING, epoch))
        return self.until(ShardState.READY, number)


@pytest.fixture
def pool(worker_pool: ProcessPool) -> Iterator[ProcessPool]:
    worker_pool.run("tests.cluster.shard.group_jobs:leave", [()] * 4)
    yield worker_pool
    worker_pool.run(f"{JOBS}:stop", [()] * 4)


def submission(request_id: str = "r") -> Submission:
    return Submission(request_id, (1, 2, 3), SamplingSpec(temperature=0.0), 900)


def test_a_survivor_of_a_broken_group_frees_its_engine_and_keeps_its_experts(pool: ProcessPool, folder: Path) -> None:
    shards = LiveShards(pool, folder, 2)
    shards.bring_up(1, PLACEMENT)
    shards.call("submit", submission())
    assert pool.run(f"{JOBS}:num_runners", [()] * 2) == [1, 1]
    shards.kill(1)
    left, = shards.until(ShardState.WAITING, 1)
    assert "rank 0" in left.detail and left.num_expert_copies == 2
    assert pool.run(f"{JOBS}:num_runners", [()]) == [0]         # nor its KV cache, before anything else is loaded
    before = left.bytes_read
    again, = shards.bring_up(2, Placement(1, (((0,),) * 4,)))
    assert again.num_expert_copies == 4 and again.bytes_read == again.bytes_to_read == 2 * EXPERT_BYTES < before


def test_a_member_that_leaves_a_working_group_lets_the_others_go(pool: ProcessPool, folder: Path) -> None:
    """They would wait for it until their collectives time out."""
    shards = LiveShards(pool, folder, 2)
    shards.bring_up(1, PLACEMENT)
    shards.call("submit", submission())
    pool.run(f"{JOBS}:do", [("show", View(GroupPhase.WAITING, None, "ended", ended_epoch_number=1))])
    assert [status.state for status in shards.until(ShardState.WAITING, 1)] == ["waiting"] * 2


def test_a_shard_leaves_an_epoch_that_has_ended_while_it_waits_for_the_others(pool: ProcessPool, folder: Path) -> None:
    shards = LiveShards(pool, folder, 1)
    shards.call("show", View(GroupPhase.LOADING, Epoch(1, (shards.members[0],) * 2, PLACEMENT, "", even_shares(2))))
    shards.until(ShardState.LOADED, 1)
    shards.call("show", View(GroupPhase.WAITING, None, "ended", ended_epoch_number=1))
    status, = shards.until(ShardState.WAITING, 1)
    assert status.num_expert_copies == 2                        # kept for the next one
