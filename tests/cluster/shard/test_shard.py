"""A real shard goes from epoch to epoch, and takes into the next one only what it needs there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from cluster.coordinator.view import GroupPhase, ShardState, View
from model.placement import Placement
from model.step import SamplingSpec
from model.transport.address import EndpointAddress, Secret
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


def test_a_survivor_of_a_broken_group_goes_on_where_it_was(pool: ProcessPool, folder: Path) -> None:
    """With the experts of the one that died, its own, its KV cache and its sequence, which nobody submits again."""
    shards = LiveShards(pool, folder, 2)
    shards.bring_up(1, PLACEMENT)
    shards.call("submit", submission())
    pool.run(f"{JOBS}:do", [("until_tokens", "r", 3)])
    lost = shards.members[1].shard_id
    shards.kill(1)
    left, = shards.until(ShardState.BROKEN, 1)
    assert "rank 1" in left.detail and left.num_expert_copies == 2 and left.lost_peers == (lost,)
    assert (left.num_running, pool.run(f"{JOBS}:num_runners", [()])) == (1, [1])
    before = left.bytes_read
    again, = shards.bring_up(2, Placement(1, (((0,),) * 4,)))
    assert again.num_expert_copies == 4 and again.bytes_read == again.bytes_to_read == 2 * EXPERT_BYTES < before
    assert again.num_running == 1 and pool.run(f"{JOBS}:num_runners", [()]) == [1]
    after, = pool.run(f"{JOBS}:do", [("until_tokens", "r", 200)])
    shards.call("submit", submission("undisturbed"))
    undisturbed, = pool.run(f"{JOBS}:do", [("until_tokens", "undisturbed", 200)])
    assert after[:200] == undisturbed[:200]


def test_the_death_of_a_member_is_noticed_while_nothing_runs(pool: ProcessPool, folder: Path) -> None:
    shards = LiveShards(pool, folder, 2)
    shards.bring_up(1, PLACEMENT)
    lost = shards.members[1].shard_id
    shards.kill(1)
    left, = shards.until(ShardState.BROKEN, 1)
    assert left.lost_peers == (lost,) and "the connection with rank 1 has ended" in left.detail


def test_a_member_that_hangs_before_the_group_has_formed_is_given_up(pool: ProcessPool, folder: Path) -> None:
    """However long this one loads: here until the end."""
    shards = LiveShards(pool, folder, 1)
    nobody = replace(shards.members[0], shard_id="hangs", heartbeat_port=9, endpoint=EndpointAddress(
        "ab" * 16, "127.0.0.1", 9, "", Secret("of nobody")))
    shards.call("occupy_model_thread")
    epoch = Epoch(1, (shards.members[0], nobody), PLACEMENT, "", even_shares(2))
    shards.call("show", View(GroupPhase.LOADING, epoch))
    left, = shards.until(ShardState.WAITING, 1)
    assert left.lost_peers == ("hangs",) and "did not answer heartbeats" in left.detail
    shards.call("show", View(GroupPhase.WAITING, None, "ended", ended_epoch_number=1))
    shards.call("free_model_thread")
    status, = shards.bring_up(2, Placement(1, (((0,),) * 4,)))
    assert status.lost_peers == ()


def test_a_member_that_the_next_epoch_leaves_out_gives_its_sequences_up(pool: ProcessPool, folder: Path) -> None:
    shards = LiveShards(pool, folder, 2)
    shards.bring_up(1, PLACEMENT)
    shards.call("submit", submission())
    alone = Epoch(2, tuple(shards.members[:1]), Placement(1, (((0,),) * 4,)), "", even_shares(1))
    shards.call("show", View(GroupPhase.LOADING, alone))
    pool.run(f"{JOBS}:do", [("until", ShardState.LOADED, 2), ("until", ShardState.WAITING, 1)])
    assert pool.run(f"{JOBS}:num_runners", [()] * 2) == [1, 0]
    _, status = pool.run(f"{JOBS}:do", [("until", ShardState.LOADED, 2), ("until", ShardState.WAITING, 1)])[1]
    assert status.num_running == 0 and status.num_expert_copies == 2


def test_a_member_that_leaves_a_working_group_lets_the_others_go(pool: ProcessPool, folder: Path) -> None:
    """They would wait for it until their collectives time out."""
    shards = LiveShards(pool, folder, 2)
    shards.bring_up(1, PLACEMENT)
    shards.call("submit", submission())
    pool.run(f"{JOBS}:do", [("show", View(GroupPhase.WAITING, None, "ended", ended_epoch_number=1))])
    assert [status.state for status in shards.until(ShardState.BROKEN, 1)] == ["broken"] * 2


def test_a_shard_leaves_an_epoch_that_has_ended_while_it_waits_for_the_others(pool: ProcessPool, folder: Path) -> None:
    shards = LiveShards(pool, folder, 1)
    shards.call("show", View(GroupPhase.LOADING, Epoch(1, (shards.members[0],) * 2, PLACEMENT, "", even_shares(2))))
    shards.until(ShardState.LOADED, 1)
    shards.call("show", View(GroupPhase.WAITING, None, "ended", ended_epoch_number=1))
    status, = shards.until(ShardState.BROKEN, 1)
    assert status.num_expert_copies == 2                        # kept for the next one


def test_one_that_is_told_to_end_serves_until_the_group_goes_on_without_it(pool: ProcessPool, folder: Path) -> None:
    shards = LiveShards(pool, folder, 2)
    shards.bring_up(1, PLACEMENT)
    shards.call("submit", submission())
    last = [("until_tokens", "r", 0), ("tell_to_end",)]
    pool.run(f"{JOBS}:do", last)
    assert pool.run(f"{JOBS}:do", [("until_tokens", "r", 5), ("until_leaving",)])[1] is True
    assert [status.state for status in shards.until(ShardState.READY, 1)] == ["ready"] * 2
    alone = Epoch(2, tuple(shards.members[:1]), Placement(1, (((0,),) * 4,)), "", even_shares(1))
    shards.call("show", View(GroupPhase.LOADING, alone, leaving=(shards.members[1].shard_id,)))
    pool.run(f"{JOBS}:do", [("until", ShardState.LOADED, 2), ("until_ended",)])


def test_when_all_are_told_to_end_none_waits_for_the_group(pool: ProcessPool, folder: Path) -> None:
    shards = LiveShards(pool, folder, 2)
    shards.bring_up(1, PLACEMENT)
    shards.call("tell_to_end")
    assert shards.call("until_leaving") == [True] * 2
    epoch = Epoch(1, tuple(shards.members), PLACEMENT, "", even_shares(2))
    leaving = tuple(member.shard_id for member in shards.members)
    shards.call("show", View(GroupPhase.READY, epoch, leaving=leaving))
    shards.call("until_ended")
