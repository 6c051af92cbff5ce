"""What tests do to the Ray cluster, as jobs of a worker process (tests/process_pool.py) that stays connected to it.

A process of its own for each command would spend seconds on importing Ray and on connecting, on cores that the cluster
needs; tests of the command line itself start such processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from subprocess import CompletedProcess

from cluster.launch.cluster_client import ClusterClient
from serving.config import load_config
from tests.command_line import moesaic_here
from tests.deadlines import PATIENCE_S
from tests.process_pool import Worker


def moesaic(worker: Worker, address: str, *arguments: str) -> CompletedProcess[str]:
    """Carry out a command that asks a running service."""
    _connect(worker, address)
    return moesaic_here(*arguments)


def deploy(worker: Worker, address: str, application: str, config_path: str) -> None:
    _connect(worker, address)
    ClusterClient(application).deploy(load_config(config_path))


def delete(worker: Worker, address: str, application: str) -> None:
    _connect(worker, address)
    client, until_s = ClusterClient(application), time.monotonic() + PATIENCE_S / 2
    with contextlib.suppress(TimeoutError):     # Ray's own, a minute
        client.delete()
    while client.is_deployed() and time.monotonic() < until_s:
        time.sleep(0.1)


def kill_coordinator(worker: Worker, address: str, application: str) -> None:
    """Kill its process; Serve notices and starts another."""
    import ray

    _connect(worker, address)
    prefix = f"SERVE_REPLICA::{application}#Coordinator#"
    names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)
             if entry["name"].startswith(prefix)]
    assert len(names) == 1, names
    ray.kill(ray.get_actor(names[0], namespace="serve"), no_restart=True)


def replace_controller(worker: Worker, address: str, application: str) -> None:
    """Kill Serve's controller, which Ray starts again, and return when the new one answers."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    _connect(worker, address)
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    pid = ray.get(controller.get_pid.remote(), timeout=PATIENCE_S)
    ray.kill(controller, no_restart=False)
    while ray.get(controller.get_pid.remote(), timeout=PATIENCE_S) == pid:      # Ray repeats a call that dies with it
        pass
    assert ClusterClient(application).is_deployed()


def keep(worker: Worker, address: str, application: str, pool: str, num: int) -> None:
    """Have Serve keep so many shards of a pool, with nobody asked: it stops whom it chooses."""
    from cluster.serve_replicas import ServeDeployments

    _connect(worker, address)
    asyncio.run(ServeDeployments(application, [pool]).keep(pool, num))


def _connect(worker: Worker, address: str) -> None:
    """Connect once; from then on commands find this process connected, and leave it so."""
    if "address" not in worker.kept:
        ClusterClient("").connect(address)
        ClusterClient.connect = lambda client, address: None     # type: ignore[method-assign]
        ClusterClient.disconnect = lambda client: None           # type: ignore[method-assign]
        worker.kept["address"] = address
    assert worker.kept["address"] == address, "a worker is connected to one cluster"
