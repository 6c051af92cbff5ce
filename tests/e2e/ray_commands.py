"""Does to the Ray cluster what tests need, in a process of its own: `python -m tests.e2e.ray_commands ADDRESS ...`."""

from __future__ import annotations

import asyncio
import sys

from cluster.launch.cluster_client import ClusterClient
from cluster.launch.state_file import RunningCluster
from serving.config import load_config


def main(address: str, command: str, application: str, *rest: str) -> None:
    running = RunningCluster(application, address, http_url="", model="")
    with ClusterClient.connected(running) as client:
        if command == "deploy":
            client.deploy(load_config(rest[0]))
        elif command == "delete":
            client.delete()
        elif command == "epoch-number":
            epoch = client.status().view.epoch
            assert sys.__stdout__ is not None       # what else is written while connected goes to stderr
            sys.__stdout__.write(str(epoch.number if epoch else 0))
        elif command == "kill-coordinator":
            kill_coordinator(application)
        elif command == "kill-controller":
            kill_controller()
        elif command == "await-controller":
            client.is_deployed()        # it answers, or Ray waits for it
        elif command == "keep":
            keep_replicas(application, rest[0], int(rest[1]))


def kill_coordinator(application: str) -> None:
    """Kill its process; Serve notices and starts another."""
    import ray

    prefix = f"SERVE_REPLICA::{application}#Coordinator#"
    names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)
             if entry["name"].startswith(prefix)]
    assert len(names) == 1, names
    ray.kill(ray.get_actor(names[0], namespace="serve"), no_restart=True)


def kill_controller() -> None:
    """Kill Serve's controller; Ray starts it again."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    ray.kill(ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE), no_restart=False)


def keep_replicas(application: str, pool: str, num: int) -> None:
    """Have Serve keep so many shards of a pool, with nobody asked: it stops whom it chooses."""
    from cluster.serve_replicas import ServeDeployments

    asyncio.run(ServeDeployments(application, [pool]).keep(pool, num))


if __name__ == "__main__":
    main(*sys.argv[1:])
