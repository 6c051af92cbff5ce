"""Tool calls as Hermes, Qwen 2.5 and Qwen 3 write them: JSON between <tool_call> and </tool_call>."""

from __future__ import annotations

from serving.text.answers.call_json import read_call
from serving.text.answers.call_writer import CallWriter
from serving.text.answers.stream_reader import MalformedError, Reads, StreamReader, ignore

BEGIN, END = "<tool_call>", "</tool_call>"


def read_hermes(reader: StreamReader, writer: CallWriter) -> Reads[None]:
    while (yield from reader.read_until([BEGIN], writer.content)) is not None:
        num_before = writer.num_calls
        reader.start_record(BEGIN)
        try:
            yield from read_call(reader, writer)
            yield from reader.starts_with(END)
        except MalformedError:
            if writer.num_calls == num_before:      # no call: it is shown as it was written
                writer.content(reader.take_record())
            else:
                yield from reader.read_until([END], ignore)
        reader.take_record()
