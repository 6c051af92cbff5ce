"""Serve grpc.health.v1 from the service itself: SERVING while it is ready, and not otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.router.generation import Service

WATCH_PERIOD_S = 0.5


class ReadinessHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Asks the service at every call, so that no status can go stale. "" stands for the whole server."""

    def __init__(self, service: Service, names: Sequence[str], watch_period_s: float = WATCH_PERIOD_S) -> None:
        self._service = service
        self._names = frozenset({"", *names})
        self._watch_period_s = watch_period_s

    async def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
                    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return self._answer(request.service)

    async def List(self, request: health_pb2.HealthListRequest, context: grpc.aio.ServicerContext
                   ) -> health_pb2.HealthListResponse:
        return health_pb2.HealthListResponse(statuses={name: self._answer(name) for name in sorted(self._names)})

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
                    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Yield each change of the status, within watch_period_s, until the client goes away."""
        told = None
        while True:
            answer = self._answer(request.service)
            if answer.status != told:
                yield answer
                told = answer.status
            await asyncio.sleep(self._watch_period_s)

    def _answer(self, name: str) -> health_pb2.HealthCheckResponse:
        statuses = health_pb2.HealthCheckResponse
        if name not in self._names:
            return statuses(status=statuses.SERVICE_UNKNOWN)
        return statuses(status=statuses.SERVING if self._service.is_ready() else statuses.NOT_SERVING)
