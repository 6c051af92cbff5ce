"""A pool of the running service has fewer shards, and more again; streams go on through both."""

from __future__ import annotations

import pytest

from tests.deadlines import PATIENCE_S
from tests.e2e.conftest import Service, eventually
from tests.e2e.steady_streams import Streams
from tests.e2e.test_operations import shards_of

pytestmark = pytest.mark.multinode


def scale(service: Service, *arguments: str) -> None:
    done = service.moesaic("scale", "cpu", *arguments, "--wait", str(PATIENCE_S / 2))
    assert done.returncode == 0, done.stdout + done.stderr


def ready_shards(service: Service) -> set[str]:
    return {str(member["shard_id"]) for member, shard in shards_of(service.status()) if shard["state"] == "ready"}


def test_the_shard_that_was_named_is_the_one_that_serve_stops(service: Service) -> None:
    pids, before = {process.pid for process in service.shard_processes()}, ready_shards(service)
    gone = min(before)
    streams = Streams(service.url)
    try:
        with streams.running():
            scale(service, "2", "--shard", gone)
        streams.verify()
        assert eventually(lambda: ready_shards(service) == before - {gone})
        assert eventually(lambda: {process.pid for process in service.shard_processes()} < pids)
    finally:
        scale(service, "3")
    assert eventually(lambda: ready_shards(service) > before - {gone})


def test_a_number_beyond_the_limits_is_refused(service: Service) -> None:
    refused = service.moesaic("scale", "cpu", "1")
    assert refused.returncode == 1 and "pool cpu may have 2 to 3 shards, not 1" in refused.stderr
