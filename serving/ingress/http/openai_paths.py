"""The paths of OpenAI's API: chats, completions, models."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.ingress.build_request import RequestBuilder
from serving.ingress.caller import Caller
from serving.ingress.http.door import AnswerStyle, Door, json_response
from serving.ingress.http.errors import openai_error
from serving.ingress.openai.answers import ModelEntry, ModelList
from serving.ingress.openai.bodies import ChatCompletionBody, CompletionBody, parse_body
from serving.ingress.openai.chat import ChatEndpoint
from serving.ingress.openai.completions import CompletionEndpoint
from serving.option_types import ToolParserName
from serving.router.generation import ModelCard, Service
from serving.text.tokenizer import Tokenizer

_CHATS = AnswerStyle("chatcmpl-", openai_error)
_COMPLETIONS = AnswerStyle("cmpl-", openai_error)


class OpenAIPaths:
    def __init__(self, door: Door, service: Service, tokenizer: Tokenizer, tool_parser: ToolParserName | None) -> None:
        self._door = door
        self._service = service
        self._builder = RequestBuilder(service, tokenizer)
        self._chat = ChatEndpoint(service, tokenizer, tool_parser)
        self._completions = CompletionEndpoint(service, tokenizer)

    def routes(self) -> list[Route]:
        route = self._door.route
        return [
            route("/v1/chat/completions", self.chat_completions, "POST"),
            route("/v1/completions", self.completions, "POST"),
            route("/v1/models", self.models), route("/v1/models/{name:path}", self.model, "GET"),
        ]

    async def chat_completions(self, request: Request, caller: Caller) -> Response:
        body = await self._door.read(request, partial(parse_body, ChatCompletionBody))
        return await self._door.generate(request, body, caller.under(body.request_id), self._chat, _CHATS)

    async def completions(self, request: Request, caller: Caller) -> Response:
        body = await self._door.read(request, partial(parse_body, CompletionBody))
        return await self._door.generate(request, body, caller.under(body.request_id), self._completions, _COMPLETIONS)

    async def models(self, request: Request, caller: Caller) -> Response:
        return json_response(ModelList(data=[_entry(card) for card in self._service.cards]))

    async def model(self, request: Request, caller: Caller) -> Response:
        return json_response(_entry(self._builder.card(request.path_params["name"])))


def _entry(card: ModelCard) -> ModelEntry:
    return ModelEntry(id=card.name, created=card.created_s, root=card.name, max_model_len=card.max_model_len)
