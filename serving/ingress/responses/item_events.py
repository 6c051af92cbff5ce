"""Parts of an answer -> items, and the events that tell of them as they grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from uuid import uuid4

from serving.ingress.chat_answer import NewId
from serving.ingress.responses.answers import (
    Event,
    FunctionCallItem,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Status,
)
from serving.text.answers.parts import Arguments, CallStart, Content, Part, Reasoning


class ItemEvents:
    """Each item begins, grows and is done before the next. `items` are those that are done."""

    def __init__(self, new_call_id: NewId) -> None:
        self.items: list[OutputItem] = []
        self._new_call_id = new_call_id
        self._open: OutputItem | None = None
        self._pieces: list[str] = []

    def write(self, parts: Sequence[Part]) -> Iterator[Event]:
        for part in parts:
            match part:
                case Content(text):
                    if not isinstance(self._open, MessageItem):
                        yield from self._begin(MessageItem(id=f"msg_{uuid4().hex}"), OutputText(text=""))
                    yield self._grow(text)
                case Reasoning(text):
                    if not isinstance(self._open, ReasoningItem):
                        yield from self._begin(ReasoningItem(id=f"rs_{uuid4().hex}"), ReasoningText(text=""))
                    yield self._grow(text)
                case CallStart(_, name):
                    yield from self._begin(FunctionCallItem(id=f"fc_{uuid4().hex}", call_id=self._new_call_id(),
                                                            name=name))
                case Arguments(_, text):
                    yield self._grow(text)

    def end(self, status: Status = "completed") -> Iterator[Event]:
        """End the item that is open."""
        item, text = self._open, "".join(self._pieces)
        if item is None:
            return
        self._open, self._pieces = None, []
        for event in _ends(item, text):
            yield self._placed(event, item)
        done = _done(item, text, status)
        yield Event(type="response.output_item.done", output_index=len(self.items), item=done)
        self.items.append(done)

    def _begin(self, item: OutputItem, part: OutputText | ReasoningText | None = None) -> Iterator[Event]:
        yield from self.end()
        self._open = item
        yield Event(type="response.output_item.added", output_index=len(self.items), item=item)
        if part is not None:
            yield self._placed(Event(type="response.content_part.added", content_index=0, part=part), item)

    def _grow(self, text: str) -> Event:
        self._pieces.append(text)
        match self._open:
            case MessageItem() as item:
                event = Event(type="response.output_text.delta", content_index=0, delta=text, logprobs=())
            case ReasoningItem() as item:
                event = Event(type="response.reasoning_text.delta", content_index=0, delta=text)
            case FunctionCallItem() as item:
                event = Event(type="response.function_call_arguments.delta", delta=text)
            case None:
                raise AssertionError("an item grows that has not begun")
        return self._placed(event, item)

    def _placed(self, event: Event, item: OutputItem) -> Event:
        return event.model_copy(update={"output_index": len(self.items), "item_id": item.id})


def _ends(item: OutputItem, text: str) -> list[Event]:
    match item:
        case MessageItem():
            return [Event(type="response.output_text.done", content_index=0, text=text, logprobs=()),
                    Event(type="response.content_part.done", content_index=0, part=OutputText(text=text))]
        case ReasoningItem():
            return [Event(type="response.reasoning_text.done", content_index=0, text=text),
                    Event(type="response.content_part.done", content_index=0, part=ReasoningText(text=text))]
        case FunctionCallItem():
            return [Event(type="response.function_call_arguments.done", name=item.name, arguments=text)]


def _done(item: OutputItem, text: str, status: Status) -> OutputItem:
    match item:
        case MessageItem():
            return item.model_copy(update={"status": status, "content": (OutputText(text=text),)})
        case ReasoningItem():
            return item.model_copy(update={"status": status, "content": (ReasoningText(text=text),)})
        case FunctionCallItem():
            return item.model_copy(update={"status": status, "arguments": text})
