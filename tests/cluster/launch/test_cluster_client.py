"""A Ray cluster that is not there is told at once; leaving one is silent. (With one: tests/e2e/test_operations.py)"""

from __future__ import annotations

import logging
import warnings

import pytest

from cluster.coordinator.client import CoordinatorUnavailableError
from cluster.launch.cluster_client import ClusterClient
from cluster.launch.state_file import NoClusterError, RunningCluster
from tests.ports import held_port

with warnings.catch_warnings():
    warnings.simplefilter("ignore")         # Ray's own, at import
    import ray.serve


@pytest.mark.parametrize("is_named", [True, False])
def test_nobody_at_the_address_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch, is_named: bool) -> None:
    address = f"127.0.0.1:{held_port()}"
    monkeypatch.setenv("RAY_ADDRESS", "" if is_named else address)
    running = RunningCluster("one", address if is_named else "auto", "http://127.0.0.1:1", "m")
    with pytest.raises(NoClusterError, match=r"no Ray cluster answers.*ray start --head"), \
            ClusterClient.connected(running):
        raise AssertionError("there is no cluster")


def test_what_serve_says_of_the_end_of_a_connection_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    serve = logging.getLogger("ray.serve")
    heard, client, level = Said(), ClusterClient("one"), serve.level
    monkeypatch.setattr("cluster.launch.cluster_client._require_answer", lambda address: None)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: serve.error("failed to consume generator ref after _on_ready"))
    try:
        for _ in range(2):      # a process connects more than once
            client.connect("127.0.0.1:1")
            serve.addHandler(heard)
            serve.warning("the HTTP options of a Serve that runs cannot be changed")
            client.disconnect()
    finally:
        serve.removeHandler(heard)
        serve.setLevel(level)
    assert said == ["the HTTP options of a Serve that runs cannot be changed"] * 2


def test_a_coordinator_that_serve_has_yet_to_make_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, application: str) -> None:
        raise KeyError(f"{name} of {application} does not exist.")
    monkeypatch.setattr(ray.serve, "get_deployment_handle", absent)
    with pytest.raises(CoordinatorUnavailableError, match="Coordinator of one does not exist"):
        ClusterClient("one").status()
