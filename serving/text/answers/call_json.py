"""A tool call written as one JSON object: {"name": ..., "arguments": {...}}, the keys in any order."""

from __future__ import annotations

import json

from serving.text.answers.call_writer import CallWriter
from serving.text.answers.stream_reader import MalformedError, Reads, StreamReader, ignore


def read_call(reader: StreamReader, writer: CallWriter) -> Reads[None]:
    """Read one call. Its arguments are written as they come, once the name is known. Raises MalformedError."""
    yield from reader.expect("{")
    name, arguments = False, ""
    while not (yield from reader.starts_with("}")):
        key = yield from reader.read_json_string()
        yield from reader.expect(":")
        if key == "name" and not name:
            writer.begin((yield from reader.read_json_string()))
            name = True
            writer.write(arguments)
        elif key in ("arguments", "parameters"):
            arguments += yield from _read_arguments(reader, writer if name else None)
        else:
            yield from reader.read_json(ignore)
        sign = yield from reader.skip_space()
        if sign == ",":
            yield from reader.expect(",")
        elif sign != "}":
            raise MalformedError
    if not name:
        raise MalformedError
    if not arguments:
        writer.write("{}")


def _read_arguments(reader: StreamReader, writer: CallWriter | None) -> Reads[str]:
    """Return the arguments, written to the writer as they come. Some models write them as JSON within a string."""
    written: list[str] = []

    def emit(text: str) -> None:
        written.append(text)
        if writer is not None:
            writer.write(text)

    if (yield from reader.skip_space()) == "{":
        yield from reader.read_json(emit)
        return "".join(written)
    raw: list[str] = []
    yield from reader.read_json(raw.append)
    emit(_unwrapped("".join(raw)))
    return "".join(written)


def _unwrapped(written: str) -> str:
    """Return the object within a string, {} for null, and anything else as it is."""
    try:
        value = json.loads(written)
        if value is None:
            return "{}"
        if isinstance(value, str) and isinstance(json.loads(value), dict):
            return value
    except ValueError:
        pass
    return written
