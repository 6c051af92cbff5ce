"""Tools of a chat: what a client may send of them, and what is asked of the answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, JsonValue

from serving.errors import InvalidRequestError, UnsupportedFieldError
from serving.ingress.body_bounds import (
    MAX_ARGUMENT_VALUES,
    MAX_SCHEMA_DEPTH,
    MAX_SCHEMA_VALUES,
    MAX_TOOLS_CHARACTERS,
    body_bounds,
)
from serving.ingress.build_request import FIRST_ERROR
from serving.ingress.json_reader import read_json
from serving.ingress.unused_fields import TOOL_CALL_FIELDS, refuse_unused
from serving.text.chat_template import ToolCall

_STRICT = ConfigDict(frozen=True, extra="allow", strict=True)
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_ARGUMENT_BOUNDS = body_bounds(0)


class FunctionBody(BaseModel):
    model_config = _STRICT
    name: str
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class ToolBody(BaseModel):
    model_config = _STRICT
    type: str
    function: FunctionBody | None = None


class CalledFunction(BaseModel):
    model_config = _STRICT
    name: str
    arguments: str | None = None


class ToolCallBody(BaseModel):
    model_config = _STRICT
    id: str | None = None
    type: str | None = None
    function: CalledFunction


class NamedFunction(BaseModel):
    model_config = _STRICT
    name: str


class NamedTool(BaseModel):
    model_config = _STRICT
    type: str
    function: NamedFunction | None = None


ToolBodies = Annotated[list[ToolBody], FIRST_ERROR]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a chat says of tools. `tools` are written into the prompt; none: nothing is to be called."""

    tools: tuple[FunctionBody, ...] = ()
    must_call: bool = False
    name: str | None = None             # of the function that must be called
    max_calls: int | None = None

    def for_template(self) -> tuple[dict[str, JsonValue], ...]:
        return tuple(_for_template(tool) for tool in self.tools)

    def schemas(self) -> dict[str, Mapping[str, JsonValue]]:
        """Return the parameters of each function, with their schemas."""
        properties = {tool.name: (tool.parameters or {}).get("properties") for tool in self.tools}
        return {name: entry if isinstance(entry, dict) else {} for name, entry in properties.items()}


def to_tool_use(tools: Sequence[ToolBody] | None, choice: str | NamedTool | None, parallel: bool | None) -> ToolUse:
    """Check tools and what is to be done with them. Raises InvalidRequestError, UnsupportedFieldError."""
    if choice == "none":
        return ToolUse()        # what must not be called need not be known
    functions = check_tools(tools or ())
    names = {function.name for function in functions}
    max_calls = 1 if parallel is False else None
    if isinstance(choice, NamedTool):
        if choice.type != "function" or choice.function is None:
            raise UnsupportedFieldError(f"tool_choice of type {choice.type[:80]!r} is not supported",
                                        fix="name a function", param="tool_choice")
        if choice.function.name not in names:
            raise InvalidRequestError(f"tool_choice names {choice.function.name[:128]!r}, which is not among the tools",
                                      fix="name one of them", param="tool_choice")
        return ToolUse(functions, must_call=True, name=choice.function.name, max_calls=max_calls)
    if choice not in (None, "auto", "required"):
        raise InvalidRequestError(f"{choice[:80]!r} is no tool_choice" if choice else "tool_choice is empty",
                                  fix="use none, auto, required, or name a function", param="tool_choice")
    if choice == "required" and not functions:
        raise InvalidRequestError("tool_choice is required, and there are no tools", fix="give tools",
                                  param="tool_choice")
    only = functions[0].name if len(functions) == 1 and choice == "required" else None
    return ToolUse(functions, choice == "required", only, max_calls)


@contextmanager
def flat_params(schema_field: str) -> Iterator[None]:
    """Name the fields of tools, in errors raised within, as an API does where a tool is its function."""
    try:
        yield
    except InvalidRequestError as error:
        named = (error.param or "").replace(".function.parameters", f".{schema_field}").replace(".function", "")
        error.param = named or None
        raise


def check_tools(tools: Sequence[ToolBody]) -> tuple[FunctionBody, ...]:
    """Return the functions. Raises InvalidRequestError, UnsupportedFieldError."""
    functions: dict[str, FunctionBody] = {}
    num_characters = 0
    for index, tool in enumerate(tools):
        param = f"tools[{index}]"
        function = _function(tool, param)
        if function.name in functions:
            raise InvalidRequestError(f"{param}: the function {function.name!r} is given twice", fix="rename one",
                                      param=f"{param}.function.name")
        functions[function.name] = function
        num_characters += len(function.description or "")
        num_characters += check_schema(function.parameters or {}, param, f"{param}.function.parameters")
        if num_characters > MAX_TOOLS_CHARACTERS:
            raise InvalidRequestError(f"the tools have more than {MAX_TOOLS_CHARACTERS} characters", param="tools",
                                      fix="give fewer, or shorter descriptions and schemas")
    return tuple(functions.values())


def _function(tool: ToolBody, param: str) -> FunctionBody:
    if tool.type != "function":
        raise UnsupportedFieldError(f"tools of type {tool.type[:80]!r} are not supported", param=f"{param}.type",
                                    fix="send tools of type function")
    refuse_unused(tool.model_extra or {}, {}, param, " in a tool")
    if tool.function is None:
        raise InvalidRequestError(f"{param}.function is missing", fix="give it", param=f"{param}.function")
    refuse_unused(tool.function.model_extra or {}, {}, f"{param}.function", " in a function")
    if not _NAME.fullmatch(tool.function.name):
        raise InvalidRequestError(f"{tool.function.name[:80]!r} is no name of a function",
                                  fix="use 1 to 128 letters, digits and _ - . : /", param=f"{param}.function.name")
    return tool.function


def check_schema(schema: JsonValue, what: str, param: str) -> int:
    """Return about how many characters it has. Raises InvalidRequestError when it is too large or too deep."""
    size, num_values, rest = 0, 0, [(schema, 1)]
    while rest:
        value, depth = rest.pop()
        num_values += 1
        if depth > MAX_SCHEMA_DEPTH or num_values > MAX_SCHEMA_VALUES:
            bound = f"{MAX_SCHEMA_DEPTH} levels" if depth > MAX_SCHEMA_DEPTH else f"{MAX_SCHEMA_VALUES} values"
            raise InvalidRequestError(f"the schema of {what} has more than {bound}", fix="simplify it",
                                      param=param)
        size += len(value) if isinstance(value, str) else 4
        if isinstance(value, dict):
            size += sum(len(key) + 4 for key in value)
            rest += [(entry, depth + 1) for entry in value.values()]
        elif isinstance(value, list):
            rest += [(entry, depth + 1) for entry in value]
    return size


def _for_template(tool: FunctionBody) -> dict[str, JsonValue]:
    """Return a tool in the order in which models have seen it. Without parameters it takes none."""
    function: dict[str, JsonValue] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def to_tool_calls(calls: Sequence[ToolCallBody], param: str) -> tuple[ToolCall, ...]:
    """Return calls of an earlier answer, their arguments as objects: so templates want them."""
    made = []
    for index, call in enumerate(calls):
        where = f"{param}.tool_calls[{index}]"
        refuse_unused(call.model_extra or {}, TOOL_CALL_FIELDS, where, " in a tool call")
        refuse_unused(call.function.model_extra or {}, {}, f"{where}.function", " in a tool call")
        if call.type not in (None, "function"):
            raise UnsupportedFieldError(f"tool calls of type {call.type[:80]!r} are not supported",
                                        fix="send calls of type function", param=f"{where}.type")
        made.append(ToolCall(call.function.name, read_arguments(call.function.arguments, f"{where}.function.arguments"),
                             call.id, len(call.function.arguments or "")))
    return tuple(made)


def check_arguments(written: Sequence[str], param: str) -> None:
    """Bound what the arguments of all calls become, before any are read. Raises InvalidRequestError."""
    num_values = sum(text.count(",") + text.count("{") + text.count("[") for text in written)
    if num_values > MAX_ARGUMENT_VALUES:
        raise InvalidRequestError(f"the arguments of all tool calls have more than {MAX_ARGUMENT_VALUES} values",
                                  fix="send fewer of the earlier messages", param=param)


def is_json_object(written: str) -> bool:
    try:
        read_json(written.encode(), _ARGUMENT_BOUNDS)
    except InvalidRequestError:
        return False
    return True


def read_arguments(written: str | None, param: str) -> dict[str, JsonValue]:
    """Return the object that is written. Raises InvalidRequestError."""
    if not (written or "").strip():
        return {}
    try:
        return read_json((written or "").encode(), _ARGUMENT_BOUNDS)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{param} is no JSON object: {error.message[:200]}", param=param,
                                  fix="give back what the model called, or leave the message out") from None
