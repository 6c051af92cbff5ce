"""Processes that are told to end, and a Serve controller that is killed, under streams: no text is cut or changes."""

from __future__ import annotations

import functools

import pytest

from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import APPLICATION, Service, eventually
from tests.e2e.steady_streams import Streams
from tests.e2e.test_pool_sizes import ready_shards, scale

pytestmark = pytest.mark.multinode
NUM_SHARDS = 3


def causes(service: Service) -> list[str]:
    changes = service.status()["membership_changes"]
    assert isinstance(changes, list)
    return [change["cause"] for change in changes]


def are_restarted(service: Service, num: int) -> bool:
    """Return whether the latest changes are those of so many, one after the other, and all serve."""
    return (causes(service)[-2 * num:] == ["drained", "joined"] * num
            and len(ready_shards(service)) == NUM_SHARDS)


def test_a_rolling_restart_of_all_shards_by_sigterm_loses_nothing(service: Service) -> None:
    streams = Streams(service.url)
    with streams.running():
        for num, process in enumerate(service.shard_processes(), 1):
            process.terminate()
            process.wait(PATIENCE_S)
            assert eventually(functools.partial(are_restarted, service, num)), causes(service)
    streams.verify()


def test_a_replica_that_serve_stops_leaves_first(service: Service) -> None:
    before, streams = ready_shards(service), Streams(service.url)
    try:
        with streams.running():
            service.ray("keep", APPLICATION, "cpu", NUM_SHARDS - 1)
            assert eventually(lambda: len(service.shard_processes()) == NUM_SHARDS - 1)
        streams.verify()
        assert eventually(lambda: causes(service)[-1] == "drained" and ready_shards(service) < before)
    finally:
        scale(service, str(NUM_SHARDS))


def test_streams_go_on_without_the_controller_of_serve(service: Service) -> None:
    pids, streams = {process.pid for process in service.shard_processes()}, Streams(service.url)
    with streams.running():
        service.ray("replace_controller", APPLICATION)
    streams.verify()
    assert {process.pid for process in service.shard_processes()} == pids
