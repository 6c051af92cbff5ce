"""The coordinator, seen through Ray Serve."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import cast

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.coordinator.client import WATCH_S, CoordinatorApi, CoordinatorUnavailableError

CALL_TIMEOUT_S = 10.0       # beyond what a watch may wait


def coordinator_of(handle: DeploymentHandle) -> CoordinatorApi:
    """Return the coordinator behind a handle. Every call has a deadline; all that can go wrong is one error."""
    return cast(CoordinatorApi, _Calls(handle))


class _Calls:
    """Turns every method of CoordinatorApi into a call of the handle's method of that name."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def __getattr__(self, method: str) -> Callable[..., Awaitable[object]]:
        return functools.partial(self._call, method)

    async def _call(self, method: str, *args: object) -> object:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S + (WATCH_S if method == "watch" else 0.0)):
                return cast(object, await getattr(self._handle, method).remote(*args))
        except TimeoutError as error:
            raise CoordinatorUnavailableError(f"the coordinator did not answer {method} in time") from error
        except (RayError, RayServeException) as error:
            raise CoordinatorUnavailableError(f"the coordinator could not be asked ({method}): {error}") from error
