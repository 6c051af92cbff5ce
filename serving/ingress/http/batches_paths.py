"""The paths of OpenAI's Batch API."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.batches.stores import BatchStores
from serving.ingress.batches.batches import BatchesEndpoint, parse_batch_body
from serving.ingress.caller import Caller
from serving.ingress.http.door import Door, json_response
from serving.ingress.http.files_paths import given


class BatchesPaths:
    def __init__(self, door: Door, stores: BatchStores | None) -> None:
        """Without stores, so without a database, each path says how to have one."""
        self._door = door
        self._endpoint = None if stores is None else BatchesEndpoint(stores)

    def routes(self) -> list[Route]:
        route = self._door.route
        return [
            route("/v1/batches", self.create, "POST"), route("/v1/batches", self.list),
            route("/v1/batches/{id}", self.get), route("/v1/batches/{id}/cancel", self.cancel, "POST"),
        ]

    async def create(self, request: Request, caller: Caller) -> Response:
        endpoint = given(self._endpoint)
        return json_response(await endpoint.create(await self._door.read(request, parse_batch_body), caller))

    async def list(self, request: Request, caller: Caller) -> Response:
        return json_response(await given(self._endpoint).list(dict(request.query_params), caller.owner))

    async def get(self, request: Request, caller: Caller) -> Response:
        return json_response(await given(self._endpoint).get(request.path_params["id"], caller.owner))

    async def cancel(self, request: Request, caller: Caller) -> Response:
        return json_response(await given(self._endpoint).cancel(request.path_params["id"], caller.owner))
