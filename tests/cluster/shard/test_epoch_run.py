"""A shard's part in one epoch ends with nothing left behind."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cluster.shard.epoch_run import EpochRun
from model.errors import GroupError
from serving.config import parse_config
from serving.link.epoch import Epoch
from serving.link.server import ShardLinkServer
from tests.cluster.coordinator.group_reports import member
from tests.placements import contiguous_placement


class BrokenEngine:
    """Its group breaks at once."""

    async def run(self) -> None:
        raise GroupError("a member died")

    async def stop(self) -> None:
        raise AssertionError("a broken group cannot be stopped")

    def tell_prepared(self) -> None: ...


class NoRevisions:
    async def run(self, *_: Any) -> None:
        await asyncio.Event().wait()


async def test_a_group_that_breaks_leaves_no_task_behind() -> None:
    """A task that goes on would keep the engine, its KV cache and the weights."""
    epoch = Epoch(1, (member("a"), member("b")), contiguous_placement(2, 6, (3, 3)), "tcp://127.0.0.1:1")
    config = parse_config({"model": {"path": "x"}, "pools": [{}]})
    with ThreadPoolExecutor(1) as thread:
        run: Any = EpochRun(epoch, 0, config, ShardLinkServer(lambda: 0.0), thread)
        run.engine, run.revisions, run._executor = BrokenEngine(), NoRevisions(), None
        before = asyncio.all_tasks()
        with pytest.raises(GroupError, match="a member died"):
            await run.until(asyncio.Event().wait())
        assert asyncio.all_tasks() == before
