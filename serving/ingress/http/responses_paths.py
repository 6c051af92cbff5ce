"""The paths of OpenAI's Responses API."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.ingress.caller import Caller
from serving.ingress.http.door import AnswerStyle, Door, json_response
from serving.ingress.http.errors import openai_error
from serving.ingress.responses.bodies import parse_body
from serving.ingress.responses.endpoint import ResponsesEndpoint
from serving.ingress.responses.store import ResponseStore
from serving.option_types import ToolParserName
from serving.router.generation import Service
from serving.text.tokenizer import Tokenizer

_RESPONSES = AnswerStyle("resp_", openai_error, has_names=True)


class ResponsesPaths:
    def __init__(self, door: Door, service: Service, tokenizer: Tokenizer, tool_parser: ToolParserName | None,
                 store: ResponseStore) -> None:
        self._door = door
        self._endpoint = ResponsesEndpoint(service, tokenizer, tool_parser, store)

    def routes(self) -> list[Route]:
        route = self._door.route
        return [
            route("/v1/responses", self.create, "POST"), route("/v1/responses/{id}", self.get),
            route("/v1/responses/{id}", self.delete, "DELETE"),
        ]

    async def create(self, request: Request, caller: Caller) -> Response:
        body = await self._door.read(request, parse_body)
        return await self._door.generate(request, body, caller, self._endpoint, _RESPONSES)

    async def get(self, request: Request, caller: Caller) -> Response:
        return json_response(await self._endpoint.get(request.path_params["id"], caller))

    async def delete(self, request: Request, caller: Caller) -> Response:
        return json_response(await self._endpoint.delete(request.path_params["id"], caller))
