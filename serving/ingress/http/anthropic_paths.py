"""The paths of Anthropic's API."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.ingress.anthropic.bodies import CountTokensBody, MessagesBody, parse_body
from serving.ingress.anthropic.messages import MessagesEndpoint
from serving.ingress.caller import Caller
from serving.ingress.http.door import AnswerStyle, Door, json_response
from serving.ingress.http.errors import anthropic_error
from serving.option_types import ToolParserName
from serving.router.generation import Service
from serving.text.tokenizer import Tokenizer

_MESSAGES = AnswerStyle("msg_", anthropic_error, has_names=True)


class AnthropicPaths:
    def __init__(self, door: Door, service: Service, tokenizer: Tokenizer, tool_parser: ToolParserName | None) -> None:
        self._door = door
        self._endpoint = MessagesEndpoint(service, tokenizer, tool_parser)

    def routes(self) -> list[Route]:
        route = self._door.route
        return [
            route("/v1/messages", self.messages, "POST", anthropic_error),
            route("/v1/messages/count_tokens", self.count_tokens, "POST", anthropic_error),
        ]

    async def messages(self, request: Request, caller: Caller) -> Response:
        body = await self._door.read(request, partial(parse_body, MessagesBody))
        response = await self._door.generate(request, body, caller, self._endpoint, _MESSAGES)
        response.headers["request-id"] = caller.request_id
        return response

    async def count_tokens(self, request: Request, caller: Caller) -> Response:
        body = await self._door.read(request, partial(parse_body, CountTokensBody))
        return json_response(await self._endpoint.count(body, caller))
