"""The composition root: one config in, one Ray Serve application out.

`serve run cluster.app:build model=...`, a Serve config file, a RayService and `moesaic up` all come through `build`.
"""

from __future__ import annotations

from ray import serve
from ray.serve import Application

from cluster.deployments import CoordinatorDeployment, RouterDeployment, ShardDeployment
from cluster.serve_replicas import deployment_of
from serving.config import PoolConfig, ServeConfig, parse_config

COORDINATOR = "Coordinator"
ROUTER = "Router"
_UNBOUNDED = 1_000_000_000      # admission bounds what a router has open (429), not Serve's queue (503)
_QUIET = {"enable_access_log": False}       # a line for every call would be most of an idle shard's work


def build(config: dict[str, object] | ServeConfig) -> Application:
    """Build the application: routers -> shards -> coordinator. Raises ConfigError."""
    if not isinstance(config, ServeConfig):
        config = parse_config(config)
    coordinator = serve.deployment(
        CoordinatorDeployment, name=COORDINATOR, num_replicas=1, max_ongoing_requests=10_000, logging_config=_QUIET,
        ray_actor_options={"num_cpus": 0}, health_check_period_s=1.0, health_check_timeout_s=10.0,
        # Its calls are questions that wait for news: nothing is lost by ending them.
        graceful_shutdown_wait_loop_s=0.1, graceful_shutdown_timeout_s=0.5).bind(config)
    shards = [_shard(config, pool).bind(config, pool.name, coordinator) for pool in config.pools]
    options = {"num_cpus": config.router.num_cpus, "resources": dict(config.router.resources)}
    router = serve.deployment(
        RouterDeployment, name=ROUTER, num_replicas=config.router.replicas, max_ongoing_requests=_UNBOUNDED,
        logging_config=_QUIET, ray_actor_options=options, health_check_period_s=5.0, health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.2, graceful_shutdown_timeout_s=20.0)
    return router.bind(config, coordinator, *shards)


def _shard(config: ServeConfig, pool: PoolConfig) -> serve.Deployment:
    options: dict[str, object] = {"num_cpus": pool.num_cpus, "resources": dict(pool.resources)}
    if pool.device == "cuda":
        options["num_gpus"] = 1
    if pool.runtime_env:
        options["runtime_env"] = dict(pool.runtime_env)
    return serve.deployment(
        ShardDeployment, name=deployment_of(pool.name), num_replicas=pool.replicas, max_replicas_per_node=1,
        max_ongoing_requests=1, ray_actor_options=options, logging_config=_QUIET, health_check_period_s=5.0,
        health_check_timeout_s=30.0, graceful_shutdown_wait_loop_s=0.1, graceful_shutdown_timeout_s=20.0)
