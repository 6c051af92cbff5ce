"""The paths of OpenAI's Files API."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from serving.batches.stores import BatchStores
from serving.errors import NotFoundError
from serving.ingress.batches.files import FilesEndpoint
from serving.ingress.caller import Caller
from serving.ingress.http.door import Door, Handler, json_response
from serving.ingress.http.errors import openai_error
from serving.ingress.http.form import read_form


class FilesPaths:
    def __init__(self, door: Door, stores: BatchStores | None) -> None:
        """Without stores, so without a database, each path says how to have one."""
        self._door = door
        self._given = None if stores is None else FilesEndpoint(stores)

    def routes(self) -> list[Route]:
        def route(path: str, handler: Handler, method: str) -> Route:
            return Route(path, self._door.guarded(handler, openai_error), methods=[method])
        return [
            route("/v1/files", self.upload, "POST"), route("/v1/files", self.list, "GET"),
            route("/v1/files/{id}", self.get, "GET"), route("/v1/files/{id}", self.delete, "DELETE"),
            route("/v1/files/{id}/content", self.content, "GET"),
        ]

    @property
    def _endpoint(self) -> FilesEndpoint:
        if self._given is None:
            raise no_database()
        return self._given

    async def upload(self, request: Request, caller: Caller) -> Response:
        return json_response(await self._endpoint.upload(read_form(request), caller.owner))

    async def list(self, request: Request, caller: Caller) -> Response:
        return json_response(await self._endpoint.list(dict(request.query_params), caller.owner))

    async def get(self, request: Request, caller: Caller) -> Response:
        return json_response(await self._endpoint.get(request.path_params["id"], caller.owner))

    async def delete(self, request: Request, caller: Caller) -> Response:
        return json_response(await self._endpoint.delete(request.path_params["id"], caller.owner))

    async def content(self, request: Request, caller: Caller) -> Response:
        num_bytes, pieces = await self._endpoint.content(request.path_params["id"], caller.owner)
        return StreamingResponse(pieces, media_type="application/octet-stream",
                                 headers={"content-length": str(num_bytes)})


def no_database() -> NotFoundError:
    return NotFoundError("this service keeps no files and batches: it has no database",
                         fix="its operator sets access.database, or access.keys, in the config")
