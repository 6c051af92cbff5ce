"""Numbers of replicas of the pools' deployments, as Ray Serve has them; another number restarts no replica.

That Serve takes them from elsewhere than its config is `external_scaler_enabled` of an application. Its REST API needs
Ray's dashboard, which local nodes do not run; the controller's method behind it is called here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.exceptions import RayServeException

from cluster.coordinator.client import CoordinatorUnavailableError
from cluster.coordinator.pool_scale import Served, ServedPool

CALL_TIMEOUT_S = 10.0
_RUNS = ("RUNNING", "UPDATING")


def deployment_of(pool: str) -> str:
    """Return the name of the pool's deployment."""
    return f"Shard-{pool}"


class ServeDeployments:
    """Is the ServeReplicas of one application, for the coordinator, which runs in it."""

    def __init__(self, application: str, pools: Sequence[str]) -> None:
        self._application = application
        self._pools = pools

    async def read(self) -> Served:
        found = (await self._call("get_serve_instance_details"))["applications"].get(self._application)
        return served_of(found, self._pools) if found else Served({})

    async def keep(self, pool: str, num_replicas: int) -> None:
        await self._call("update_deployment_replicas", DeploymentID(deployment_of(pool), self._application),
                         num_replicas)

    async def _call(self, method: str, *arguments: object) -> Any:
        try:
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await getattr(controller, method).remote(*arguments)
        except (TimeoutError, ValueError, RayError, RayServeException) as error:
            raise CoordinatorUnavailableError(f"Serve's controller did not answer {method}: {error}") from error


def served_of(application: Mapping[str, Any], pools: Sequence[str]) -> Served:
    """Read what Serve says of an application, in the schema of its REST API."""
    deployments = application["deployments"]
    return Served({pool: _served_pool(deployments[deployment_of(pool)]) for pool in pools
                   if deployment_of(pool) in deployments}, application["external_scaler_enabled"])


def _served_pool(deployment: Mapping[str, Any]) -> ServedPool:
    states = [replica["state"] for replica in deployment["replicas"]]
    is_well = deployment["status"] == "HEALTHY"
    return ServedPool(deployment["target_num_replicas"], sum(state in _RUNS for state in states),
                      "" if is_well else deployment["message"])
