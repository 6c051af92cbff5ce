"""The gRPC door: moesaic.v1.Inference, grpc.health.v1 and reflection. The same code behind it as behind HTTP.

A failed call's trailing metadata says more than its status: x-request-id, error-code, error-param, retry-after (s).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Never, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serving.errors import InvalidRequestError
from serving.ingress.auth import choose_tenant, key_of_headers
from serving.ingress.body_bounds import MAX_BODY_BYTES, body_bounds
from serving.ingress.build_request import Asked, RequestBuilder
from serving.ingress.caller import choose_request_id
from serving.ingress.chat_answer import ChatAnswer, ChatAsked
from serving.ingress.chat_request import ChatBuilder
from serving.ingress.collect import UsageCount, open_stream
from serving.ingress.grpc.health import ReadinessHealth
from serving.ingress.grpc.messages import (
    num_logprobs,
    to_chat_response,
    to_fields,
    to_format,
    to_model,
    to_prompt,
    to_question,
    to_response,
    to_tokenize_prompt,
    to_usage,
)
from serving.ingress.grpc.wire_bounds import bounded_reader
from serving.ingress.status import to_shared
from serving.ingress.structured_output import grammar_of
from serving.option_types import ToolParserName
from serving.proto import inference_pb2 as pb
from serving.router.generation import GenerationDelta, GenerationRequest, Service
from serving.tenants.key import Key, Scope
from serving.tenants.key_ring import KeyRing
from serving.text.tokenizer import Tokenizer

M = TypeVar("M", pb.GenerateRequest, pb.TokenizeRequest)
P = TypeVar("P")
_LONG_MESSAGE_BYTES = 16 * 2**10
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_BODY_BYTES),
    ("grpc.max_send_message_length", MAX_BODY_BYTES),
    ("grpc.so_reuseport", 0),       # a port that is taken must be an error
]


def build_grpc_server(service: Service, tokenizer: Tokenizer, keys: KeyRing | None = None,
                      tool_parser: ToolParserName | None = None) -> grpc.aio.Server:
    """Return the server of one router replica; the caller gives it a port and starts it in its event loop. Without
    `keys` everybody may ask."""
    server = grpc.aio.server(options=_OPTIONS)
    servicer, bounds = InferenceServicer(service, tokenizer, keys, tool_parser), body_bounds(
        max(card.max_model_len for card in service.cards))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {
        "Generate": grpc.unary_stream_rpc_method_handler(
            servicer.Generate, bounded_reader(pb.GenerateRequest, bounds), pb.GenerateResponse.SerializeToString),
        "ListModels": grpc.unary_unary_rpc_method_handler(
            servicer.ListModels, pb.ListModelsRequest.FromString, pb.ListModelsResponse.SerializeToString),
        "Tokenize": grpc.unary_unary_rpc_method_handler(
            servicer.Tokenize, bounded_reader(pb.TokenizeRequest, bounds), pb.TokenizeResponse.SerializeToString),
    }),))
    health_pb2_grpc.add_HealthServicer_to_server(ReadinessHealth(service, [SERVICE_NAME]), server)
    reflection.enable_server_reflection([SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    return server


class InferenceServicer:
    def __init__(self, service: Service, tokenizer: Tokenizer, keys: KeyRing | None,
                 tool_parser: ToolParserName | None) -> None:
        self._service = service
        self._chats = ChatBuilder(service, tokenizer, tool_parser)
        self._keys = keys
        self._builder = RequestBuilder(service, tokenizer)

    async def Generate(self, request: pb.GenerateRequest | InvalidRequestError, context: grpc.aio.ServicerContext
                       ) -> AsyncIterator[pb.GenerateResponse]:
        request_id = _request_id(context, request.request_id if isinstance(request, pb.GenerateRequest) else "")
        try:
            key = self._authenticate(context)
            if isinstance(request, InvalidRequestError):
                raise request
            asked = Asked(
                model=request.model or None, fields=to_fields(request.sampling), request_id=request_id,
                tenant=choose_tenant(key, request.tenant), deadline_s=context.time_remaining(),
                num_logprobs=num_logprobs(request.sampling),
                priority=request.priority if request.HasField("priority") else None,
                traceparent=_metadata(context, "traceparent") or "")
            answer = await self._build(request, asked)
            # gRPC cancels this coroutine when the client cancels or its deadline passes, which closes the streams.
            async with open_stream(self._service, [answer.generation]) as deltas:
                async for _, delta in deltas:
                    yield answer.write(delta)
        except Exception as error:
            await _abort(context, error, request_id)

    async def ListModels(self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
                         ) -> pb.ListModelsResponse:
        request_id = _request_id(context)
        try:
            self._authenticate(context)
            return pb.ListModelsResponse(models=[to_model(card) for card in self._service.cards])
        except Exception as error:
            return await _abort(context, error, request_id)

    async def Tokenize(self, request: pb.TokenizeRequest | InvalidRequestError, context: grpc.aio.ServicerContext
                       ) -> pb.TokenizeResponse:
        request_id = _request_id(context)
        try:
            self._authenticate(context)
            if isinstance(request, InvalidRequestError):
                raise request
            card = self._builder.card(request.model or None)
            token_ids = await self._builder.count(await _in_turn(request, to_tokenize_prompt), card)
            return pb.TokenizeResponse(token_ids=token_ids, max_model_len=card.max_model_len)
        except Exception as error:
            return await _abort(context, error, request_id)

    async def _build(self, request: pb.GenerateRequest, asked: Asked) -> _Answer:
        if request.WhichOneof("prompt") == "chat":
            chat = await self._chats.build(await _in_turn(request, lambda message: to_question(message, asked)))
            return _Answer(chat.request, asked.request_id, chat)
        prompt = await _in_turn(request, to_prompt)
        grammar = await grammar_of(to_format(request), asked.fields)
        (generation,) = await self._builder.build(replace(asked, grammar=grammar or ""), [prompt])
        return _Answer(generation, asked.request_id)

    def _authenticate(self, context: grpc.aio.ServicerContext) -> Key | None:
        return key_of_headers(_metadata(context, "authorization"), _metadata(context, "x-api-key"), self._keys,
                              Scope.INFER)


class _Answer:
    """Writes the responses to one request, the usage into the last. `chat` None: it is no chat."""

    def __init__(self, generation: GenerationRequest, request_id: str, chat: ChatAsked | None = None) -> None:
        self.generation = generation
        self._request_id = request_id
        self._num_open = generation.params.n
        self._usage = UsageCount([generation])
        self._choices = [] if chat is None else [ChatAnswer(chat) for _ in range(generation.params.n)]

    def write(self, delta: GenerationDelta) -> pb.GenerateResponse:
        self._usage.add(0, delta)
        self._num_open -= delta.finish_reason is not None
        response = to_chat_response(delta, self._request_id, self._choices[delta.choice]) if self._choices \
            else to_response(delta, self._request_id)
        if self._num_open == 0:
            self._usage.num_reasoning_tokens = sum(choice.num_reasoning_tokens for choice in self._choices)
            response.usage.CopyFrom(to_usage(self._usage))
        return response


async def _in_turn(request: M, translate: Callable[[M], P]) -> P:
    """Translate a long message in a thread, so that others have their turn meanwhile."""
    if request.ByteSize() < _LONG_MESSAGE_BYTES:
        return translate(request)
    return await asyncio.to_thread(translate, request)


def _request_id(context: grpc.aio.ServicerContext, given: str = "") -> str:
    return choose_request_id(given or _metadata(context, "x-request-id"))


def _metadata(context: grpc.aio.ServicerContext, key: str) -> str | None:
    return next((str(value) for name, value in context.invocation_metadata() if name == key), None)


async def _abort(context: grpc.aio.ServicerContext, error: Exception, request_id: str) -> Never:
    """End the call as the table of errors says."""
    shared = to_shared(error, request_id)
    trailing = [("x-request-id", request_id), ("error-code", shared.status.openai_code)]
    trailing += [("error-param", shared.param)] if shared.param else []
    trailing += [("retry-after", str(shared.retry_after_s))] if shared.retry_after_s is not None else []
    await context.abort(shared.status.grpc, shared.message, tuple(trailing))
    raise AssertionError("abort raises")
