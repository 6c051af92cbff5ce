"""Serve /v1/responses: a body becomes a chat, and its deltas a response or the events of one."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

from serving.engine.request import FinishReason
from serving.errors import NotReadyError
from serving.ingress.caller import Caller, Stamp
from serving.ingress.chat_answer import ChatAnswer, ChatAsked, collect_chat
from serving.ingress.chat_request import ChatBuilder, renamed_params
from serving.ingress.collect import UsageCount, open_stream
from serving.ingress.responses.answers import (
    CachedTokens,
    Deleted,
    Event,
    FunctionCallItem,
    Incomplete,
    OutputItem,
    ReasoningTokens,
    Response,
    ResponseError,
    ResponseUsage,
)
from serving.ingress.responses.bodies import Item, Reasoning, ResponseBody, TextConfig
from serving.ingress.responses.chats import to_items, to_question
from serving.ingress.responses.item_events import ItemEvents
from serving.ingress.responses.store import Kept, ResponseStore
from serving.ingress.status import to_shared
from serving.ingress.tools import is_json_object
from serving.option_types import ToolParserName
from serving.router.generation import Service
from serving.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_PARAMS = {"max_tokens": "max_output_tokens", "response_format": "text.format", "messages": "input"}


@dataclass(frozen=True, slots=True)
class ResponseAsked:
    """`before`: the items of the conversation, the body's own included."""

    chat: ChatAsked
    body: ResponseBody
    before: tuple[Item, ...]
    owner: str
    stamp: Stamp


class ResponsesEndpoint:
    def __init__(self, service: Service, tokenizer: Tokenizer, tool_parser: ToolParserName | None,
                 store: ResponseStore) -> None:
        self._service = service
        self._builder = ChatBuilder(service, tokenizer, tool_parser)
        self._store = store

    async def build(self, body: ResponseBody, caller: Caller, stamp: Stamp) -> ResponseAsked:
        """Check the body. Raises InvalidRequestError and its kinds, NotFoundError, NotReadyError."""
        owner, previous = caller.owner, body.previous_response_id
        before = () if previous is None else (await self._store.get(owner, previous, "previous_response_id")).items
        with renamed_params(_PARAMS):
            chat = await self._builder.build(to_question(body, before, caller))
        return ResponseAsked(chat, body, before + to_items(body.input), owner, stamp)

    async def answer(self, asked: ResponseAsked) -> Response:
        """Return the whole response. Raises ServingError."""
        (choice,), (answer,), usage = await collect_chat(self._service, asked.chat)
        items, is_cut = ItemEvents(asked.chat.new_id), choice.finish_reason is FinishReason.LENGTH
        for _ in (*items.write(answer.kept), *items.end("incomplete" if is_cut else "completed")):
            pass        # nobody listens to the events
        return await self._finished(asked, items.items, is_cut, usage, answer)

    async def stream(self, asked: ResponseAsked) -> AsyncGenerator[bytes]:
        """Yield the response's events, as they go over the wire. Raises ServingError before the first."""
        answer, usage, items = ChatAnswer(asked.chat), UsageCount([asked.chat.request]), ItemEvents(asked.chat.new_id)
        wire = _Wire()
        try:
            async with open_stream(self._service, [asked.chat.request]) as deltas:
                async for index, delta in deltas:
                    usage.add(index, delta)
                    if not wire.num_events:
                        begun = _response(asked)
                        yield wire.write([Event(type="response.created", response=begun),
                                          Event(type="response.in_progress", response=begun)])
                    events = list(items.write(answer.read(delta)))
                    if delta.finish_reason is not None:
                        is_cut = delta.finish_reason is FinishReason.LENGTH
                        events += items.end("incomplete" if is_cut else "completed")
                        whole = await self._finished(asked, items.items, is_cut, usage, answer)
                        events.append(Event(type=f"response.{whole.status}", response=whole))
                    if events:
                        yield wire.write(events)
        except Exception as error:
            if not wire.num_events:
                raise
            yield wire.write([_failed(asked, error)])

    async def get(self, response_id: str, caller: Caller) -> Response:
        """Return a response that was kept. Raises NotFoundError, NotReadyError."""
        return (await self._store.get(caller.owner, response_id, "response_id")).response

    async def delete(self, response_id: str, caller: Caller) -> Deleted:
        """Forget it. Raises NotFoundError, NotReadyError."""
        await self._store.delete(caller.owner, response_id, "response_id")
        return Deleted(id=response_id)

    async def _finished(self, asked: ResponseAsked, items: list[OutputItem], is_cut: bool, usage: UsageCount,
                        answer: ChatAnswer) -> Response:
        response = _response(asked).model_copy(update={
            "status": "incomplete" if is_cut else "completed", "output": tuple(items),
            "incomplete_details": Incomplete() if is_cut else None, "usage": _usage(usage, answer)})
        if response.store:
            kept = Kept(response=response, items=asked.before + tuple(map(_as_input, items)))
            try:
                await self._store.keep(asked.owner, kept)
            except NotReadyError as error:      # the answer is there, and says that it cannot be followed
                logger.warning("response_unkept request_id=%s why=%s", asked.chat.request.request_id, error)
                return response.model_copy(update={"store": False})
        return response


class _Wire:
    """Numbers events and writes them."""

    def __init__(self) -> None:
        self.num_events = 0

    def write(self, events: Iterable[Event]) -> bytes:
        written = []
        for event in events:
            content = event.model_copy(update={"sequence_number": self.num_events}).model_dump_json().encode()
            written.append(b"event: %b\ndata: %b\n\n" % (event.type.encode(), content))
            self.num_events += 1
        return b"".join(written)


def _response(asked: ResponseAsked) -> Response:
    body, params = asked.body, asked.chat.request.params
    return Response(
        id=asked.stamp.id, created_at=asked.stamp.created_s, status="in_progress", model=asked.chat.request.model,
        instructions=body.instructions, max_output_tokens=body.max_output_tokens, metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False, previous_response_id=body.previous_response_id,
        reasoning=body.reasoning or Reasoning(), store=body.store is not False, temperature=params.temperature,
        text=TextConfig(format={"type": "text"}) if body.text is None else body.text,
        tool_choice=body.tool_choice or "auto", tools=body.tools or [], top_p=params.top_p, user=body.user)


def _failed(asked: ResponseAsked, error: Exception) -> Event:
    told = to_shared(error, asked.chat.request.request_id)
    return Event(type="response.failed", response=_response(asked).model_copy(update={
        "status": "failed",
        "error": ResponseError(code=told.status.openai_code, message=told.message, param=told.param)}))


def _usage(count: UsageCount, answer: ChatAnswer) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=count.num_prompt_tokens, input_tokens_details=CachedTokens(cached_tokens=count.num_cached_tokens),
        output_tokens=count.num_generated_tokens, total_tokens=count.num_prompt_tokens + count.num_generated_tokens,
        output_tokens_details=ReasoningTokens(reasoning_tokens=answer.num_reasoning_tokens))


def _as_input(item: OutputItem) -> Item:
    """Return the item as a client would give it back. Arguments that are no object are of no use to a template."""
    if isinstance(item, FunctionCallItem) and not is_json_object(item.arguments):
        item = item.model_copy(update={"arguments": "{}"})
    return Item.model_validate(item.model_dump(mode="json"))
