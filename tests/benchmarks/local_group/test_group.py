"""Processes of a local group, one of each kind: they are there, are seen, and end."""

from __future__ import annotations

import argparse
from pathlib import Path

import psutil
import pytest

from benchmarks.local_group.group import LocalGroup, LocalGroupError
from benchmarks.local_group.leaks import growth, is_idle
from benchmarks.local_group.setup import config_of, questions_for, undisturbed
from tests.benchmarks.group_checkpoint import LOAD, tiny


async def test_a_group_serves_is_seen_and_ends(tmp_path: Path) -> None:
    folder = Path(tiny(tmp_path))
    config = config_of(folder, argparse.Namespace(members=1, copies=1, speed=None), LOAD)
    async with LocalGroup(config, tmp_path) as group:
        group.start_all(["n0"])
        answers = await undisturbed(group, questions_for(folder, LOAD, 1))
        assert len({answer.digest for answer in answers}) == LOAD.num_streams
        assert is_idle(await group.until(is_idle, "it is idle"))
        footprints = group.footprints()
        assert set(footprints) == {"coordinator.0", "n0.0", "router0.0"} and not growth(footprints, footprints, 0)
        with pytest.raises(LocalGroupError, match="not within 0 s: two are there[^$]*-- n0.0"):
            await group.until(lambda status: len(status.shards) == 2, "two are there", timeout_s=0.1)
        pids = [process.pid for process in group.started]
        shard, = group.alive("shard")
        shard.kill()
        assert not group.alive("shard")         # at once, though the system takes a while to end it
        await shard.until_ended()
    assert not group.leaked() and not any(psutil.pid_exists(pid) for pid in pids)
