"""The application that a config becomes, as Ray Serve will see it."""

from __future__ import annotations

import warnings

import pytest

from serving.config import ConfigError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")         # Ray's own, at import
    from ray.serve._private.build_app import build_app
    from ray.serve._private.common import DeploymentID

    from cluster.app import build

CONFIG: dict[str, object] = {
    "model": {"path": "x"}, "router": {"replicas": 2, "resources": {"door": 1}},
    "pools": [{"name": "big", "device": "cuda", "replicas": 2, "num_cpus": 4, "resources": {"h200": 1}},
              {"name": "small", "replicas": 3, "num_cpus": 2}]}


def test_one_deployment_for_routers_one_for_the_coordinator_one_for_each_pool() -> None:
    built = build_app(build(CONFIG), name="m", route_prefix="/", logging_config=None, default_runtime_env={},
                      make_deployment_handle=lambda deployment, name: DeploymentID(deployment.name, name))
    by_name = {deployment.name: deployment for deployment in built.deployments}
    assert set(by_name) == {"Router", "Coordinator", "Shard-big", "Shard-small"}
    assert built.ingress_deployment_name == "Router" and by_name["Router"].num_replicas == 2
    assert (by_name["Router"].ray_actor_options or {})["resources"] == {"door": 1}
    big, small = by_name["Shard-big"], by_name["Shard-small"]
    assert (big.num_replicas, small.num_replicas) == (2, 3)
    assert big._replica_config.max_replicas_per_node == small._replica_config.max_replicas_per_node == 1
    assert big.ray_actor_options is not None and small.ray_actor_options is not None
    assert (big.ray_actor_options["num_gpus"], big.ray_actor_options["resources"]) == (1, {"h200": 1})
    assert small.ray_actor_options["num_cpus"] == 2 and "num_gpus" not in small.ray_actor_options


def test_a_wrong_config_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match="pools.0.replicaz: unknown key"):
        build({"model": {"path": "x"}, "pools": [{"replicaz": 1}]})
