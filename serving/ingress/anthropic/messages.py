"""Serve /v1/messages: a body becomes a chat, and its deltas a message or the events of one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

from pydantic import JsonValue
from pydantic_core import from_json

from serving.engine.request import FinishReason
from serving.ingress.anthropic.answers import (
    BlockDelta,
    BlockStart,
    BlockStop,
    ContentBlock,
    Event,
    InputDelta,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    SignatureDelta,
    StopDelta,
    StopReason,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    TokenCount,
    ToolUseBlock,
    Usage,
)
from serving.ingress.anthropic.bodies import CountTokensBody, MessagesBody
from serving.ingress.anthropic.chats import to_question
from serving.ingress.caller import Caller, Stamp
from serving.ingress.chat_answer import ChatAnswer, ChatAsked, NewId, collect_chat
from serving.ingress.chat_request import ChatBuilder, renamed_params
from serving.ingress.collect import UsageCount, open_stream
from serving.option_types import ToolParserName
from serving.router.generation import Service
from serving.text.answers.parts import Arguments, CallStart, Content, Part, Reasoning
from serving.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class MessageAsked:
    chat: ChatAsked
    stamp: Stamp


class MessagesEndpoint:
    def __init__(self, service: Service, tokenizer: Tokenizer, tool_parser: ToolParserName | None = None) -> None:
        self._service = service
        self._builder = ChatBuilder(service, tokenizer, tool_parser)

    async def count(self, body: CountTokensBody, caller: Caller) -> TokenCount:
        return TokenCount(input_tokens=await self._builder.count(to_question(body, caller)))

    async def build(self, body: MessagesBody, caller: Caller, stamp: Stamp) -> MessageAsked:
        """Check the body. Raises InvalidRequestError and its kinds, ModelNotFoundError."""
        with renamed_params({"response_format": "output_config.format"}):
            return MessageAsked(await self._builder.build(to_question(body, caller)), stamp)

    async def answer(self, asked: MessageAsked) -> Message:
        """Return the whole message. Raises ServingError."""
        (choice,), (answer,), usage = await collect_chat(self._service, asked.chat)
        reason, sequence = _stop(answer, choice.finish_reason, choice.stop_reason)
        return Message(id=asked.stamp.id, model=asked.chat.request.model,
                       content=_to_blocks(answer.kept, answer.new_id), stop_reason=reason, stop_sequence=sequence,
                       usage=_usage(usage))

    async def stream(self, asked: MessageAsked) -> AsyncGenerator[bytes]:
        """Yield the message's events, as they go over the wire. Raises ServingError."""
        request = asked.chat.request
        answer, usage, blocks = ChatAnswer(asked.chat), UsageCount([request]), _BlockEvents(asked.chat.new_id)
        has_begun = False
        async with open_stream(self._service, [request]) as deltas:
            async for index, delta in deltas:
                usage.add(index, delta)
                if not has_begun:
                    has_begun = True
                    yield _written(MessageStart(message=Message(
                        id=asked.stamp.id, model=request.model, content=[], stop_reason=None, stop_sequence=None,
                        usage=_usage(usage))))
                events = list(blocks.write(answer.read(delta)))
                if delta.finish_reason is not None:
                    reason, sequence = _stop(answer, delta.finish_reason, delta.stop_reason)
                    events += [*blocks.end(), MessageDelta(
                        delta=StopDelta(stop_reason=reason, stop_sequence=sequence), usage=_usage(usage)),
                        MessageStop()]
                if events:
                    yield b"".join(map(_written, events))


class _BlockEvents:
    """Turns parts into events: each block begins, goes on and stops before the next."""

    def __init__(self, new_id: NewId) -> None:
        self._new_id = new_id
        self._index = -1
        self._open: type[Part] | None = None        # Arguments: a call

    def write(self, parts: Sequence[Part]) -> Iterator[Event]:
        for part in parts:
            match part:
                case Content(text):
                    yield from self._begin(Content, TextBlock(text=""))
                    yield self._delta(TextDelta(text=text))
                case Reasoning(text):
                    yield from self._begin(Reasoning, ThinkingBlock(thinking=""))
                    yield self._delta(ThinkingDelta(thinking=text))
                case CallStart(_, name):
                    yield from self.end()
                    yield from self._begin(Arguments, ToolUseBlock(id=self._new_id(), name=name, input={}))
                case Arguments(_, text):
                    yield self._delta(InputDelta(partial_json=text))

    def end(self) -> Iterator[Event]:
        """Stop the block that is open."""
        if self._open is Reasoning:
            yield self._delta(SignatureDelta())
        if self._open is not None:
            self._open = None
            yield BlockStop(index=self._index)

    def _begin(self, kind: type[Part], block: ContentBlock) -> Iterator[Event]:
        if self._open is kind:
            return
        yield from self.end()
        self._open = kind
        self._index += 1
        yield BlockStart(index=self._index, content_block=block)

    def _delta(self, delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta) -> Event:
        return BlockDelta(index=self._index, delta=delta)


def _to_blocks(parts: Sequence[Part], new_id: NewId) -> list[ContentBlock]:
    """Return what the events of the same parts would add up to."""
    blocks: list[ContentBlock] = []
    pieces: list[str] = []
    for event in [*(events := _BlockEvents(new_id)).write(parts), *events.end()]:
        match event:
            case BlockStart(content_block=block):
                blocks.append(block)
                pieces = []
            case BlockDelta(delta=TextDelta(text=text) | ThinkingDelta(thinking=text) | InputDelta(partial_json=text)):
                pieces.append(text)
            case BlockStop():
                blocks[-1] = _filled(blocks[-1], "".join(pieces))
    return blocks


def _filled(block: ContentBlock, text: str) -> ContentBlock:
    match block:
        case TextBlock():
            return TextBlock(text=text)
        case ThinkingBlock():
            return ThinkingBlock(thinking=text)
    return block.model_copy(update={"input": _input(text)})


def _input(written: str) -> dict[str, JsonValue]:
    """Return the arguments; of those that were cut off as much as has come."""
    try:
        value = from_json(written or "{}", allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _stop(answer: ChatAnswer, reason: FinishReason | None, stopped_by: str | int | None
          ) -> tuple[StopReason, str | None]:
    if answer.finish_reason(reason) == "tool_calls":
        return "tool_use", None
    if reason is FinishReason.LENGTH:
        return "max_tokens", None
    return ("stop_sequence", stopped_by) if isinstance(stopped_by, str) else ("end_turn", None)


def _usage(count: UsageCount) -> Usage:
    return Usage(input_tokens=count.num_prompt_tokens - count.num_cached_tokens,
                 cache_read_input_tokens=count.num_cached_tokens, output_tokens=count.num_generated_tokens)


def _written(event: Event) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event.type.encode(), event.model_dump_json().encode())
