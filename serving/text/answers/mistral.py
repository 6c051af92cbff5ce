"""Tool calls as Mistral's models write them, behind [TOOL_CALLS]: a JSON list of calls, or name[ARGS]{...} of each."""

from __future__ import annotations

from serving.text.answers.call_json import read_call
from serving.text.answers.call_writer import CallWriter
from serving.text.answers.stream_reader import MalformedError, Reads, StreamReader, ignore

BEGIN = "[TOOL_CALLS]"
_ARGS, _CALL_ID = "[ARGS]", "[CALL_ID]"
_MAX_NAME = 256


def read_mistral(reader: StreamReader, writer: CallWriter) -> Reads[None]:
    while (yield from reader.read_until([BEGIN], writer.content)) is not None:
        num_before = writer.num_calls
        reader.start_record(BEGIN)
        try:
            yield from _read_calls(reader, writer)
        except MalformedError:
            if writer.num_calls == num_before:
                writer.content(reader.take_record())
        reader.take_record()


def _read_calls(reader: StreamReader, writer: CallWriter) -> Reads[None]:
    sign = yield from reader.skip_space()
    if sign == "{":
        yield from read_call(reader, writer)
    elif sign == "[":
        yield from reader.expect("[")
        yield from read_call(reader, writer)
        while (yield from reader.starts_with(",")):
            yield from read_call(reader, writer)
        yield from reader.expect("]")
    else:
        yield from _read_named(reader, writer)


def _read_named(reader: StreamReader, writer: CallWriter) -> Reads[None]:
    name: list[str] = []
    marker = yield from reader.read_until([_ARGS, _CALL_ID, "{", BEGIN], name.append)
    found = "".join(name).strip()
    if marker is None or marker == BEGIN or not found or len(found) > _MAX_NAME:
        raise MalformedError
    if marker == _CALL_ID and (yield from reader.read_until([_ARGS], ignore)) is None:
        raise MalformedError
    writer.begin(found)
    if marker == "{":
        reader.unread("{")
    yield from reader.read_json(writer.write)
