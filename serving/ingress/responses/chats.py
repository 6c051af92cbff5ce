"""A body of the Responses API, and what came before it -> the chat that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import JsonValue

from serving.errors import InvalidRequestError, UnsupportedFieldError
from serving.ingress.build_request import Asked, SamplingFields, chat_message
from serving.ingress.caller import Caller
from serving.ingress.chat_request import ChatQuestion, effort_variables
from serving.ingress.prompts import Conversation
from serving.ingress.responses.bodies import (
    ITEM_FIELDS,
    PART_FIELDS,
    TOOL_FIELDS,
    ContentPart,
    Item,
    NamedTool,
    ResponseBody,
    ToolBody,
)
from serving.ingress.tools import (
    FunctionBody,
    NamedFunction,
    ToolUse,
    check_arguments,
    flat_params,
    read_arguments,
    to_tool_use,
)
from serving.ingress.tools import NamedTool as SharedNamedTool
from serving.ingress.tools import ToolBody as SharedTool
from serving.ingress.unused_fields import refuse_unused
from serving.text.chat_template import ChatMessage, ToolCall

_TEXTS = ("input_text", "output_text", "reasoning_text", "summary_text", "text")
_INCLUDED = ("reasoning.encrypted_content",)        # there is none: the reasoning is in the item


def to_items(given: str | Sequence[Item]) -> tuple[Item, ...]:
    return (Item(role="user", content=given),) if isinstance(given, str) else tuple(given)


def to_question(body: ResponseBody, before: Sequence[Item], caller: Caller) -> ChatQuestion:
    """Return the chat, of which `before` are the items of the response that this one follows.

    Raises InvalidRequestError, UnsupportedFieldError.
    """
    for name in body.include or ():
        if name not in _INCLUDED:
            raise UnsupportedFieldError(f"include={name[:80]!r} is not supported", fix="remove it", param="include")
    fields = SamplingFields(max_tokens=body.max_output_tokens, temperature=body.temperature, top_p=body.top_p)
    new = to_items(body.input)
    check_arguments([item.arguments or "" for item in (*before, *new)], "input")
    read = _Messages()
    if body.instructions:
        read.messages.append(chat_message("system", body.instructions))
    for item in before:
        read.add(item, "previous_response_id")
    for index, item in enumerate(new):
        read.add(item, f"input[{index}]")
    effort = None if body.reasoning is None else body.reasoning.effort
    conversation = Conversation(tuple(read.messages), variables=effort_variables(effort, "reasoning.effort"))
    asked = Asked(body.model, fields, caller.request_id, caller.tenant(body.user), priority=body.priority,
                  traceparent=caller.traceparent)
    return ChatQuestion(asked, conversation, _tools(body), _formats(body))


class _Messages:
    """Messages as templates know them: what the assistant thinks, says and calls between two others is one."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []

    def add(self, item: Item, param: str) -> None:
        refuse_unused(item.model_extra or {}, ITEM_FIELDS, param, " in an item")
        match item.type:
            case "message":
                self._add_message(item, param)
            case "reasoning":
                thought = _text(item.content or item.summary or "", f"{param}.content")
                self._extend(ChatMessage("assistant", "", reasoning=thought or None))
            case "function_call":
                name, call_id = _given(item.name, f"{param}.name"), _given(item.call_id, f"{param}.call_id")
                arguments = read_arguments(item.arguments, f"{param}.arguments")
                self._extend(ChatMessage("assistant", "", tool_calls=(
                    ToolCall(name, arguments, call_id, len(item.arguments or "")),)))
            case "function_call_output":
                self.messages.append(ChatMessage("tool", _text(item.output, f"{param}.output"),
                                                 tool_call_id=_given(item.call_id, f"{param}.call_id")))
            case _:
                raise UnsupportedFieldError(f"items of type {item.type[:80]!r} are not supported",
                                            param=f"{param}.type", fix="send messages, function_call, "
                                            "function_call_output and reasoning items")

    def _add_message(self, item: Item, param: str) -> None:
        role = _given(item.role, f"{param}.role")
        if role == "tool":
            raise InvalidRequestError("'tool' is no role of an item", fix="send a function_call_output",
                                      param=f"{param}.role")
        message = chat_message(role, _text(item.content, f"{param}.content"), param=param)
        if role == "assistant":
            self._extend(message)
        else:
            self.messages.append(message)

    def _extend(self, more: ChatMessage) -> None:
        if not self.messages or self.messages[-1].role != "assistant":
            self.messages.append(more)
            return
        last = self.messages[-1]
        self.messages[-1] = replace(
            last, content="\n".join(filter(None, (last.content, more.content))),
            reasoning="\n".join(filter(None, (last.reasoning, more.reasoning))) or None,
            tool_calls=last.tool_calls + more.tool_calls)


def _text(content: str | Sequence[ContentPart] | None, param: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidRequestError(f"{param} is missing", fix="give it", param=param)
    texts = []
    for index, part in enumerate(content):
        where = f"{param}[{index}]"
        if part.type not in (*_TEXTS, "refusal"):
            raise UnsupportedFieldError(f"content of type {part.type[:80]!r} is not supported",
                                        fix="send parts of type input_text", param=f"{where}.type")
        refuse_unused(part.model_extra or {}, PART_FIELDS, where, " in a content part")
        texts.append(_given(part.refusal if part.type == "refusal" else part.text, f"{where}.text"))
    return "\n".join(texts)


def _given(value: str | None, param: str) -> str:
    if value is None:
        raise InvalidRequestError(f"{param} is missing", fix="give it", param=param)
    return value


def _tools(body: ResponseBody) -> ToolUse:
    if body.tool_choice == "none":
        return ToolUse()
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]
    choice = body.tool_choice
    with flat_params("parameters"):
        return to_tool_use(tools, _named(choice) if isinstance(choice, NamedTool) else choice,
                           body.parallel_tool_calls)


def _tool(tool: ToolBody, param: str) -> SharedTool:
    if tool.type != "function":
        raise UnsupportedFieldError(f"tools of type {tool.type[:80]!r} are not supported", param=f"{param}.type",
                                    fix="send tools of type function")
    refuse_unused(tool.model_extra or {}, TOOL_FIELDS, param, " in a tool")
    return SharedTool(type="function", function=FunctionBody(
        name=_given(tool.name, f"{param}.name"), description=tool.description, parameters=tool.parameters,
        strict=tool.strict))


def _named(choice: NamedTool) -> SharedNamedTool:
    if choice.type == "function":
        refuse_unused(choice.model_extra or {}, {}, "tool_choice", " in tool_choice")
    named = None if choice.name is None else NamedFunction(name=choice.name)
    return SharedNamedTool(type=choice.type, function=named)


def _formats(body: ResponseBody) -> dict[str, JsonValue]:
    """Return `text.format` as chats have it."""
    written = None if body.text is None else body.text.format
    if written is None:
        return {}
    if written.get("type") != "json_schema":
        return {"response_format": written}
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": written.get("schema")}}}
