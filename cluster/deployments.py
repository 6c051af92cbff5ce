"""The Ray Serve classes, kept thin: each makes its part with what Ray knows, and lets Serve watch over it.

Shard and router are imported inside the constructors: this module is imported by the driver and by every replica, and
they load torch, and the doors.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import secrets
import socket
import time

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster.background import Background
from cluster.coordinator.autoscaling import Autoscaler
from cluster.coordinator.coordinator import NUMBER_JUMP, Coordinator
from cluster.coordinator.follow_load import follow_load
from cluster.coordinator.group_rules import group_rules
from cluster.coordinator.handle import coordinator_of
from cluster.device.model_store import locate_checkpoint
from cluster.device.node import NODE_LABEL, NodeIdentity
from cluster.http_proxy import WithoutRequestId
from cluster.serve_replicas import ServeDeployments
from cluster.termination import until_told_to_end
from model.args import read_model_args
from serving.config import ServeConfig
from serving.log_format import LogFormat, log_handler
from serving.supervision import run_endless


class CoordinatorDeployment(Coordinator):
    """Is the coordinator itself: others call its methods. There is one replica; another takes its place, and the
    members tell it all."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]     # Serve awaits it
        _begin_log(config.log_format)
        args = read_model_args(locate_checkpoint(config.model, "facts"))
        rules = group_rules(args, config)
        super().__init__(rules, time.monotonic, numbers_above=secrets.randbelow(NUMBER_JUMP))
        self._config = config
        serve_deployments = ServeDeployments(serve.get_replica_context().app_name, [pool.name for pool in config.pools])
        tasks = {"rebalancing": self.run(config.placement.rebalance_interval_s),
                 "sizes": self.follow_serve(serve_deployments)}
        if config.autoscaling is not None:
            tasks["load"] = follow_load(self, Autoscaler(config, rules.plan))
        self._background = Background(asyncio.create_task(until_told_to_end(run_endless(**tasks))))

    async def running_config(self) -> ServeConfig:
        """Return what the application was deployed with."""
        return self._config

    async def check_health(self) -> None:
        self._background.check()

    async def __del__(self) -> None:
        await self._background.stop()


class ShardDeployment:
    """See cluster/shard/shard.py. The constructor ends when the first epoch runs, so the application is not RUNNING
    before the model is served; meanwhile the routers answer and say what is awaited."""

    async def __init__(  # type: ignore[misc]     # Serve awaits it
            self, config: ServeConfig, pool_name: str, coordinator: DeploymentHandle) -> None:
        _begin_log(config.log_format)
        await asyncio.to_thread(importlib.import_module, "cluster.shard.shard")     # seconds: torch
        from cluster.shard.shard import Shard

        pool = next(pool for pool in config.pools if pool.name == pool_name)
        shard = Shard(config, pool, _node_identity(), coordinator_of(coordinator))
        self._background = Background(asyncio.create_task(until_told_to_end(shard.run())))
        await self._background.wait_for(asyncio.create_task(shard.until_ready()))

    async def check_health(self) -> None:
        self._background.check()

    async def __del__(self) -> None:
        await self._background.stop()


@serve.ingress()
class RouterDeployment:
    """See cluster/router_replica.py. `shards` are not called: naming them makes them part of the application."""

    async def __init__(  # type: ignore[misc]     # Serve awaits it
            self, config: ServeConfig, coordinator: DeploymentHandle, *shards: DeploymentHandle) -> None:
        from cluster.router_replica import RouterReplica

        _begin_log(config.log_format)
        self._replica = RouterReplica(config, _node_identity(), coordinator_of(coordinator))
        self._background = Background(asyncio.create_task(until_told_to_end(self._replica.run())))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return what Serve's proxies reach; the replica's own doors are open beside it."""
        return WithoutRequestId(self._replica.http_app)

    async def check_health(self) -> None:
        self._background.check()

    async def __del__(self) -> None:
        await self._background.stop()


def _node_identity() -> NodeIdentity:
    context = ray.get_runtime_context()
    name = context.get_node_labels().get(NODE_LABEL) or socket.gethostname()
    return NodeIdentity(context.get_node_id(), str(name), ray.util.get_node_ip_address())


def _begin_log(log_format: LogFormat) -> None:
    """Ray keeps files for stdout and stderr of every process; without this only warnings get there."""
    logging.basicConfig(handlers=[log_handler(log_format)])
    for package in ("cluster", "serving", "model"):
        logging.getLogger(package).setLevel(logging.INFO)
