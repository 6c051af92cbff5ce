"""A Ray cluster that is not there is told at once. (With one: tests/e2e/test_operations.py)"""

from __future__ import annotations

import pytest

from cluster.launch.cluster_client import ClusterClient
from cluster.launch.state_file import NoClusterError, RunningCluster
from tests.ports import held_port


@pytest.mark.parametrize("is_named", [True, False])
def test_nobody_at_the_address_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch, is_named: bool) -> None:
    address = f"127.0.0.1:{held_port()}"
    monkeypatch.setenv("RAY_ADDRESS", "" if is_named else address)
    running = RunningCluster("one", address if is_named else "auto", "http://127.0.0.1:1", "m")
    with pytest.raises(NoClusterError, match=r"no Ray cluster answers.*ray start --head"), \
            ClusterClient.connected(running):
        raise AssertionError("there is no cluster")
