"""Parts of an answer -> a message of OpenAI's API, or the delta of one chunk."""

from __future__ import annotations

from collections.abc import Sequence

from serving.ingress.chat_answer import NewId
from serving.ingress.openai.answers import (
    ChatDelta,
    ChatMessageAnswer,
    FunctionCall,
    FunctionDelta,
    ToolCallAnswer,
    ToolCallDelta,
)
from serving.text.answers.parts import Arguments, CallStart, Content, Part, Reasoning


def to_delta(parts: Sequence[Part], new_id: NewId) -> ChatDelta:
    """Return one chunk's delta. Calls that it goes on with have no id, those that begin in it have one."""
    calls: list[ToolCallDelta] = []
    for part in parts:
        if isinstance(part, CallStart):
            calls.append(ToolCallDelta(index=part.index, id=new_id(), type="function",
                                       function=FunctionDelta(name=part.name)))
        elif isinstance(part, Arguments):
            if calls and calls[-1].index == part.index:
                said = calls[-1].function
                calls[-1] = calls[-1].model_copy(update={"function": said.model_copy(
                    update={"arguments": said.arguments + part.text})})
            else:
                calls.append(ToolCallDelta(index=part.index, function=FunctionDelta(arguments=part.text)))
    reasoning = _joined(parts, Reasoning)
    return ChatDelta(content=_joined(parts, Content), reasoning_content=reasoning, reasoning=reasoning,
                     tool_calls=calls or None)


def to_message(parts: Sequence[Part], new_id: NewId) -> ChatMessageAnswer:
    """Return the whole message. Its content is null where there are calls alone."""
    names: list[str] = []
    arguments: list[list[str]] = []
    for part in parts:
        if isinstance(part, CallStart):
            names.append(part.name)
            arguments.append([])
        elif isinstance(part, Arguments):
            arguments[part.index].append(part.text)
    calls = [ToolCallAnswer(id=new_id(), function=FunctionCall(name=name, arguments="".join(pieces)))
             for name, pieces in zip(names, arguments, strict=True)]
    reasoning, content = _joined(parts, Reasoning), _joined(parts, Content)
    return ChatMessageAnswer(content=content if calls or content is not None else "", reasoning_content=reasoning,
                             reasoning=reasoning, tool_calls=calls or None)


def _joined(parts: Sequence[Part], kind: type[Content] | type[Reasoning]) -> str | None:
    """Return the text of one kind, None without any."""
    return "".join(part.text for part in parts if isinstance(part, kind)) or None
