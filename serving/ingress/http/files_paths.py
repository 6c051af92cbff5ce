"""The paths of OpenAI's Files API."""

from __future__ import annotations

from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from serving.batches.stores import BatchStores
from serving.errors import NotFoundError
from serving.ingress.batches.files import FilesEndpoint
from serving.ingress.caller import Caller
from serving.ingress.http.door import Door, json_response
from serving.ingress.http.form import read_form

E = TypeVar("E")


class FilesPaths:
    def __init__(self, door: Door, stores: BatchStores | None) -> None:
        """Without stores, so without a database, each path says how to have one."""
        self._door = door
        self._endpoint = None if stores is None else FilesEndpoint(stores)

    def routes(self) -> list[Route]:
        route = self._door.route
        return [
            route("/v1/files", self.upload, "POST"), route("/v1/files", self.list),
            route("/v1/files/{id}", self.get), route("/v1/files/{id}", self.delete, "DELETE"),
            route("/v1/files/{id}/content", self.content),
        ]

    async def upload(self, request: Request, caller: Caller) -> Response:
        return json_response(await given(self._endpoint).upload(read_form(request), caller.owner))

    async def list(self, request: Request, caller: Caller) -> Response:
        return json_response(await given(self._endpoint).list(dict(request.query_params), caller.owner))

    async def get(self, request: Request, caller: Caller) -> Response:
        return json_response(await given(self._endpoint).get(request.path_params["id"], caller.owner))

    async def delete(self, request: Request, caller: Caller) -> Response:
        return json_response(await given(self._endpoint).delete(request.path_params["id"], caller.owner))

    async def content(self, request: Request, caller: Caller) -> Response:
        num_bytes, pieces = await given(self._endpoint).content(request.path_params["id"], caller.owner)
        return StreamingResponse(pieces, media_type="application/octet-stream",
                                 headers={"content-length": str(num_bytes)})


def given(endpoint: E | None) -> E:
    """Return it. Raises NotFoundError where there is none, for want of a database."""
    if endpoint is None:
        raise NotFoundError("this service keeps no files and batches: it has no database",
                            fix="its operator sets access.database, or access.keys, in the config")
    return endpoint
