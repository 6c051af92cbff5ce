"""Tool calls as Qwen3-Coder and Qwen 3.5 write them, between tags; their arguments become JSON by the tool's schema.

    <tool_call>
    <function=name>
    <parameter=key>
    value
    </parameter>
    </function>
    </tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Never

from pydantic import JsonValue

from serving.text.answers.call_writer import CallWriter
from serving.text.answers.stream_reader import MalformedError, Reads, StreamReader, ignore

BEGIN, END = "<tool_call>", "</tool_call>"
_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
Schemas = Mapping[str, Mapping[str, JsonValue]]     # by function, then by parameter


def read_qwen3_coder(reader: StreamReader, writer: CallWriter, schemas: Schemas) -> Reads[None]:
    while (begin := (yield from reader.read_until([BEGIN, _FUNCTION], writer.content))) is not None:
        num_before = writer.num_calls
        reader.start_record(begin)
        try:
            if begin == BEGIN:
                yield from reader.expect(_FUNCTION)
            yield from _read_function(reader, writer, schemas)
            yield from reader.starts_with(END)
        except MalformedError:
            if writer.num_calls == num_before:
                writer.content(reader.take_record())
        reader.take_record()


def _read_function(reader: StreamReader, writer: CallWriter, schemas: Schemas) -> Reads[None]:
    name = yield from _read_name(reader)
    writer.begin(name)
    writer.write("{")
    num_parameters, parameters = 0, schemas.get(name, {})
    marker = yield from reader.read_until([_PARAMETER, _END_FUNCTION, END], ignore)
    while marker == _PARAMETER:
        key = yield from _read_name(reader)
        writer.write(f"{', ' if num_parameters else ''}{json.dumps(key, ensure_ascii=False)}: ")
        marker = yield from _read_value(reader, writer, parameters.get(key))
        if marker == _END_PARAMETER:
            marker = yield from reader.read_until([_PARAMETER, _END_FUNCTION, END], ignore)
        num_parameters += 1
    if marker is None:
        raise MalformedError    # cut off: the arguments stay open
    writer.write("}")
    if marker == END:
        reader.unread(END)


def _read_name(reader: StreamReader) -> Reads[str]:
    """Read up to the end of an opening tag."""
    name: list[str] = []
    if (yield from reader.read_until([">"], name.append)) is None or not (found := "".join(name).strip()):
        raise MalformedError
    return found


def _read_value(reader: StreamReader, writer: CallWriter, schema: JsonValue) -> Reads[str | None]:
    """Write one value and return the tag behind it. A string is written as it comes, others when they are whole."""
    value = _Value(writer, is_string=_types(schema) in ((), ("string",)))
    # A model may forget the end of a parameter: the next tag ends it as well.
    marker = yield from reader.read_until([_END_PARAMETER, _PARAMETER, _END_FUNCTION], value.add)
    value.end(_types(schema), is_whole=marker is not None)
    return marker


class _Value:
    """One parameter's text without the line break at either end."""

    def __init__(self, writer: CallWriter, is_string: bool) -> None:
        self._writer = writer
        self._is_string = is_string
        self._starts = True
        self._held = ""             # a line break, which may be the last
        self._whole: list[str] = []
        if is_string:
            writer.write('"')

    def add(self, text: str) -> None:
        if not text:
            return
        if self._starts:
            self._starts = False
            text = text.removeprefix("\n")
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        text = text.removesuffix("\n")
        if self._is_string:
            self._writer.write(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._whole.append(text)

    def end(self, types: tuple[str, ...], is_whole: bool) -> None:
        if not is_whole:
            return
        self._writer.write('"' if self._is_string else _to_json("".join(self._whole), types))


def _types(schema: JsonValue) -> tuple[str, ...]:
    """Return the types that a schema names; "any" where it has others than by name, none where nothing is said."""
    if not isinstance(schema, dict):
        return ()
    stated = schema.get("type")
    if isinstance(stated, str):
        return (stated,)
    if isinstance(stated, list):
        return tuple(str(entry) for entry in stated)
    values = schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return ("string",)
    return ("any",) if {"anyOf", "oneOf", "allOf", "$ref", "enum", "const"} & schema.keys() else ()


def _to_json(text: str, types: tuple[str, ...]) -> str:
    """Return a value as JSON: what it is by itself where the schema allows that, else a string."""
    try:
        value = json.loads(text.strip(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = {"true": True, "false": False, "none": None}.get(text.strip().lower(), text)
    if "any" not in types and not _is_one_of(value, types):
        value = text
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:      # 1e999
        return json.dumps(text, ensure_ascii=False)


def _is_one_of(value: JsonValue, types: tuple[str, ...]) -> bool:
    kinds: dict[str, type | tuple[type, ...]] = {
        "boolean": bool, "integer": int, "number": (int, float), "object": dict, "array": list, "null": type(None)}
    return any(isinstance(value, kinds[name]) and (name == "boolean" or not isinstance(value, bool))
               for name in types if name in kinds)


def _refuse(constant: str) -> Never:
    raise ValueError(constant)
