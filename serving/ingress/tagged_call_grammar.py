"""What a call between tags, as Qwen3-Coder and Qwen 3.5 write it, looks like behind its beginning, as a grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import JsonValue

from serving.errors import UnsupportedFieldError
from serving.ingress.tools import FunctionBody

_OF_OBJECT = {"type", "properties", "required", "additionalProperties", "title", "description", "$schema"}
_OF_TEXT = {"type", "enum", "title", "description", "default", "examples"}
_FREE = 'any_parameters: (/<parameter=[^<>\\n]+>\\n/ any_value)*\nany_value[suffix="\\n</parameter>\\n"]: /(?s:.*)/'


def tagged_call_grammar(functions: Sequence[FunctionBody], named: str | None) -> str:
    """Return the lark grammar of one call of one of them, or of `named`, whose name the prompt says already. The
    parameters of a strict function come in the order of its schema. Raises UnsupportedFieldError."""
    calls, rules = [], [_FREE]
    for index, function in enumerate(functions):
        head = "" if named else json.dumps(f"{function.name}>\n") + " "
        if not function.strict:
            calls.append(head + "any_parameters")
            continue
        calls.append(f"{head}call{index}")
        rules += _rules(function, index)
    end = '"</function>" "\\n"? "</tool_call>"'
    return "\n".join([f"start: ({' | '.join(calls)}) {end}", *rules])


def _rules(function: FunctionBody, index: int) -> list[str]:
    schema = function.parameters or {}
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if not set(schema) <= _OF_OBJECT or not isinstance(properties, dict) or not isinstance(required, list):
        raise _not_held(function, ", ".join(sorted(set(schema) - _OF_OBJECT)) or "properties")
    parts, rules = [], []
    for number, (name, of_value) in enumerate(properties.items()):
        rule = f"value{index}_{number}"
        part = f'({json.dumps(f"<parameter={name}>" + chr(10))} {rule})'
        parts.append(part if name in required else f"{part}?")
        rules.append(_value_rule(rule, of_value, function, name))
    return [f"call{index}: {' '.join(parts) or chr(34) * 2}", *rules]


def _value_rule(rule: str, schema: JsonValue, function: FunctionBody, name: str) -> str:
    if not isinstance(schema, dict) or schema.get("type") != "string":
        return f'{rule}: %json {json.dumps(schema)} "\\n</parameter>\\n"'
    if not set(schema) <= _OF_TEXT:
        raise _not_held(function, f"{name}.{min(set(schema) - _OF_TEXT)}")
    choices = schema.get("enum")
    if isinstance(choices, list):
        return f"{rule}: ({' | '.join(json.dumps(str(choice)) for choice in choices)}) " + '"\\n</parameter>\\n"'
    return f'{rule}[suffix="\\n</parameter>\\n"]: /(?s:.*)/'


def _not_held(function: FunctionBody, what: str) -> UnsupportedFieldError:
    return UnsupportedFieldError(
        f"{what[:200]} in the schema of the strict function {function.name!r} cannot be held in this model's format",
        param="tools", fix="remove it or strict, or set tool_choice to auto")
