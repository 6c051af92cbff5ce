"""What a call that must be made looks like, behind the beginning that the prompt gives it, as a grammar."""

from __future__ import annotations

import json

from serving.ingress.tagged_call_grammar import tagged_call_grammar
from serving.ingress.tools import FunctionBody, ToolUse
from serving.option_types import ToolParserName

_CALL_ENDS: dict[ToolParserName | None, str] = {"hermes": '"}" "\\n"? "</tool_call>"', "mistral": '"}" "]"'}


def call_grammar(tools: ToolUse, parser: ToolParserName | None) -> str | None:
    """Return the lark grammar of one call whose strict function's arguments follow its schema; None where nothing is
    strict, or no call must be made: then it is up to the model. Raises UnsupportedFieldError."""
    functions = [function for function in tools.tools if tools.name in (None, function.name)]
    if not tools.must_call or not any(function.strict for function in functions):
        return None
    if parser == "qwen3_coder":
        return tagged_call_grammar(functions, tools.name)
    heads = [_head(function, tools.name) + f" args{index}" for index, function in enumerate(functions)]
    rules = [f"args{index}: %json {json.dumps(_schema(function))}" for index, function in enumerate(functions)]
    return "\n".join([f"start: call {_CALL_ENDS[parser]}", f"call: {' | '.join(heads)}", *rules])


def _head(function: FunctionBody, named: str | None) -> str:
    """Return what stands before the arguments: the name, where the prompt does not say it."""
    if named:
        return '" "?'
    written = f'{json.dumps(function.name)}, "arguments":'
    return f'" "? {json.dumps(written)} " "?'


def _schema(function: FunctionBody) -> object:
    return (function.parameters or {"type": "object", "properties": {}}) if function.strict else {"type": "object"}
