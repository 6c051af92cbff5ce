"""A body of the Messages API -> the chat that it asks for."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue

from serving.errors import InvalidRequestError, UnsupportedFieldError
from serving.ingress.anthropic.bodies import (
    BLOCK_FIELDS,
    TOOL_FIELDS,
    Block,
    CountTokensBody,
    MessagesBody,
    ResultPart,
    ToolBody,
    ToolChoice,
    TurnBody,
)
from serving.ingress.build_request import Asked, SamplingFields, chat_message
from serving.ingress.caller import Caller
from serving.ingress.chat_request import ChatQuestion
from serving.ingress.prompts import Conversation
from serving.ingress.tools import FunctionBody, NamedFunction, NamedTool, ToolUse, flat_params, to_tool_use
from serving.ingress.tools import ToolBody as SharedTool
from serving.ingress.unused_fields import refuse_unused
from serving.text.chat_template import ChatMessage, ToolCall

_ROLES = ("user", "assistant", "system")
_THINKING = ("enabled", "adaptive", "disabled")
_EFFORTS = ("low", "medium", "high", "xhigh", "max")


def to_question(body: CountTokensBody, caller: Caller) -> ChatQuestion:
    """Return the chat. An answer that the client has begun, in a last message of the assistant, is gone on with.

    Raises InvalidRequestError, UnsupportedFieldError.
    """
    messages = [] if body.system is None else [chat_message("system", _text(body.system, "system"), param="system")]
    begun = _begun(body.messages)
    for index, turn in enumerate(body.messages if begun is None else body.messages[:-1]):
        messages += _to_messages(turn, f"messages[{index}]")
    conversation = Conversation(tuple(messages), variables=_variables(body), answer_start=begun or "")
    return ChatQuestion(_asked(body, caller), conversation, _tools(body), _formats(body), _shows_thinking(body))


def _asked(body: CountTokensBody, caller: Caller) -> Asked:
    if not isinstance(body, MessagesBody):
        return Asked(body.model, SamplingFields(), caller.request_id, caller.tenant(None))
    fields = SamplingFields(max_tokens=body.max_tokens, stop=body.stop_sequences, temperature=body.temperature,
                            top_k=body.top_k, top_p=body.top_p)
    user = None if body.metadata is None else body.metadata.user_id
    return Asked(body.model, fields, caller.request_id, caller.tenant(user), priority=body.priority,
                 traceparent=caller.traceparent)


def _begun(turns: Sequence[TurnBody]) -> str | None:
    """Return the text that the answer begins with, None where the client has begun none."""
    if not turns or turns[-1].role != "assistant":
        return None
    content, param = turns[-1].content, f"messages[{len(turns) - 1}]"
    if isinstance(content, list) and any(block.type != "text" for block in content):
        raise InvalidRequestError("the last message is the assistant's and has more than text", param=param,
                                  fix="answer its calls in a message of the user")
    begun = _text(content, f"{param}.content")
    if begun != begun.rstrip():
        raise InvalidRequestError("the last message, of the assistant, ends with white space", param=param,
                                  fix="remove it: no token goes on behind it")
    return begun


def _to_messages(turn: TurnBody, param: str) -> list[ChatMessage]:
    """Return one turn as templates know it: the result of each tool is a message of its own."""
    refuse_unused(turn.model_extra or {}, {}, param, " in a message")
    if turn.role not in _ROLES:
        raise InvalidRequestError(f"{turn.role[:80]!r} is not a role", fix=f"use one of: {', '.join(_ROLES)}",
                                  param=f"{param}.role")
    if isinstance(turn.content, str):
        return [chat_message(turn.role, turn.content, param=param)]
    read = _Turn(turn.role)
    for index, block in enumerate(turn.content):
        read.add(block, f"{param}.content[{index}]")
    return read.messages(param)


class _Turn:
    """The blocks of one turn, by what they are."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[ToolCall] = []
        self._results: list[ChatMessage] = []

    def add(self, block: Block, param: str) -> None:
        refuse_unused(block.model_extra or {}, BLOCK_FIELDS, param, " in a block")
        match (self._role, block.type):
            case (_, "text"):
                self._texts.append(_given(block.text, f"{param}.text"))
            case ("assistant", "thinking"):
                self._thoughts.append(_given(block.thinking, f"{param}.thinking"))
            case ("assistant", "redacted_thinking"):
                pass        # of another model, which nobody else can read
            case ("assistant", "tool_use"):
                self._calls.append(_call(block, param))
            case ("user", "tool_result"):
                self._results.append(_result(block, param))
            case _:
                raise UnsupportedFieldError(
                    f"blocks of type {block.type[:80]!r} are not supported in a message of {self._role}",
                    param=f"{param}.type", fix="send text, tool_use and tool_result blocks")

    def messages(self, param: str) -> list[ChatMessage]:
        said = "\n".join(self._texts)
        if self._role == "assistant":
            return [ChatMessage("assistant", said, reasoning="\n".join(self._thoughts) or None,
                                tool_calls=tuple(self._calls))]
        is_said = self._texts or not self._results
        return self._results + ([chat_message(self._role, said, param=param)] if is_said else [])


def _call(block: Block, param: str) -> ToolCall:
    arguments = {} if block.input is None else block.input
    return ToolCall(_given(block.name, f"{param}.name"), arguments, _given(block.id, f"{param}.id"),
                    _num_characters(arguments))


def _num_characters(value: JsonValue) -> int:
    """Return about how many characters it is written in."""
    size, rest = 0, [value]
    while rest:
        entry = rest.pop()
        size += len(entry) if isinstance(entry, str) else 4
        if isinstance(entry, dict):
            size += sum(map(len, entry))
            rest += entry.values()
        elif isinstance(entry, list):
            rest += entry
    return size


def _result(block: Block, param: str) -> ChatMessage:
    """Return what a tool said; where it failed, behind the word that says so: templates have no sign for it."""
    said = "" if block.content is None else _text(block.content, f"{param}.content")
    return ChatMessage("tool", f"Error: {said}" if block.is_error else said,
                       tool_call_id=_given(block.tool_use_id, f"{param}.tool_use_id"))


def _text(content: str | Sequence[Block | ResultPart], param: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, block in enumerate(content):
        where = f"{param}[{index}]"
        if block.type != "text":
            raise UnsupportedFieldError(f"blocks of type {block.type[:80]!r} are not supported here", fix="send text",
                                        param=f"{where}.type")
        refuse_unused(block.model_extra or {}, BLOCK_FIELDS, where, " in a block")
        texts.append(_given(block.text, f"{where}.text"))
    return "\n".join(texts)


def _given(text: str | None, param: str) -> str:
    if text is None:
        raise InvalidRequestError(f"{param} is missing", fix="give it", param=param)
    return text


def _tools(body: CountTokensBody) -> ToolUse:
    choice = body.tool_choice
    if choice is not None and choice.type == "none":
        return ToolUse()
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())]
    parallel = None if choice is None or not choice.disable_parallel_tool_use else False
    with flat_params("input_schema"):
        return to_tool_use(tools, None if choice is None else _choice(choice), parallel)


def _tool(tool: ToolBody, param: str) -> SharedTool:
    if tool.type not in (None, "custom"):
        raise UnsupportedFieldError(f"tools of type {tool.type[:80]!r} are not supported", param=f"{param}.type",
                                    fix="send tools of your own, without type")
    refuse_unused(tool.model_extra or {}, TOOL_FIELDS, param, " in a tool")
    return SharedTool(type="function", function=FunctionBody(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict))


def _choice(choice: ToolChoice) -> str | NamedTool:
    refuse_unused(choice.model_extra or {}, {}, "tool_choice", " in tool_choice")
    if choice.type == "tool":
        return NamedTool(type="function", function=NamedFunction(name=_given(choice.name, "tool_choice.name")))
    if choice.type not in ("auto", "any"):
        raise InvalidRequestError(f"tool_choice is of type {choice.type[:80]!r}", fix="use auto, any, tool or none",
                                  param="tool_choice.type")
    return "required" if choice.type == "any" else "auto"


def _variables(body: CountTokensBody) -> dict[str, JsonValue]:
    """Return what the chat template is told. Who asks for no thinking gets none, where the template has a switch."""
    thinking = "disabled" if body.thinking is None else body.thinking.type
    if thinking not in _THINKING:
        raise InvalidRequestError(f"thinking is of type {thinking[:80]!r}", fix=f"use one of: {', '.join(_THINKING)}",
                                  param="thinking.type")
    told: dict[str, JsonValue] = {"enable_thinking": thinking != "disabled"}
    effort = None if body.output_config is None else body.output_config.effort
    if effort is None:
        return told
    if effort not in _EFFORTS:
        raise InvalidRequestError(f"effort is {effort[:80]!r}", fix=f"use one of: {', '.join(_EFFORTS)}",
                                  param="output_config.effort")
    return told | {"reasoning_effort": effort}


def _shows_thinking(body: CountTokensBody) -> bool:
    display = None if body.thinking is None else body.thinking.display
    if display not in (None, "summarized", "omitted"):
        raise InvalidRequestError(f"display is {display[:80]!r}", fix="use summarized, which shows all, or omitted",
                                  param="thinking.display")
    return display != "omitted"


def _formats(body: CountTokensBody) -> dict[str, JsonValue]:
    written = None if body.output_config is None else body.output_config.format
    if written is None:
        return {}
    if written.get("type") != "json_schema" or not isinstance(written.get("schema"), dict):
        raise InvalidRequestError("output_config.format has no schema", param="output_config.format",
                                  fix='give {"type": "json_schema", "schema": {...}}')
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": written["schema"]}}}
