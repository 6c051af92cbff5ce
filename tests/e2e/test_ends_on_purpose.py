"""Processes that are told to end, and a Serve controller that is killed, under streams: no text is cut or changes."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import APPLICATION, Service, eventually
from tests.e2e.steady_streams import Streams
from tests.e2e.test_pool_sizes import ready_shards, scale

pytestmark = pytest.mark.multinode
NUM_SHARDS = 3


def causes(service: Service) -> list[str]:
    changes = service.status()["membership_changes"]
    assert isinstance(changes, list)
    return [change["cause"] for change in changes]


def test_a_rolling_restart_of_all_shards_by_sigterm_loses_nothing(service: Service) -> None:
    streams = Streams(service.url)
    with streams.running():
        for process in service.shard_processes():
            process.terminate()
            process.wait(60)
            assert eventually(lambda: len(ready_shards(service)) == NUM_SHARDS)
    streams.verify()
    assert causes(service)[-2 * NUM_SHARDS:] == ["drained", "joined"] * NUM_SHARDS


def test_a_replica_that_serve_stops_leaves_first(service: Service) -> None:
    before, streams = ready_shards(service), Streams(service.url)
    with streams.running():
        service.ray("keep", APPLICATION, "cpu", str(NUM_SHARDS - 1))
        assert eventually(lambda: len(service.shard_processes()) == NUM_SHARDS - 1)
    streams.verify()
    assert causes(service)[-1] == "drained"
    assert ready_shards(service) < before
    scale(service, str(NUM_SHARDS))


def test_streams_go_on_without_the_controller_of_serve(service: Service) -> None:
    pids, streams = {process.pid for process in service.shard_processes()}, Streams(service.url)
    with streams.running():
        service.ray("kill-controller", APPLICATION)
        service.ray("await-controller", APPLICATION)
    streams.verify()
    assert {process.pid for process in service.shard_processes()} == pids
