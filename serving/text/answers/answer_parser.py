"""Reads the answer of one choice, piece by piece: reasoning first, then content and tool calls."""

from __future__ import annotations

from serving.text.answers import hermes, mistral, qwen3_coder, reasoning
from serving.text.answers.answer_format import AnswerRules
from serving.text.answers.call_writer import CallWriter
from serving.text.answers.parts import Part, Reasoning
from serving.text.answers.stream_reader import Reads, StreamReader


class AnswerParser:
    """Reads one choice. However its text is split, the parts of one kind join to the same."""

    def __init__(self, rules: AnswerRules) -> None:
        self._thoughts: list[Part] = []
        self._writer = CallWriter(rules.max_calls)
        self._reader = StreamReader()
        self._calls = _read_calls(rules, self._reader, self._writer)
        self._thinking = _ReasoningPart(rules, self._thoughts, self._reader)
        next(self._calls, None)
        self._start = self.push(rules.start)

    @property
    def is_thinking(self) -> bool | None:
        """Return whether what comes next is reasoning. None: not known yet."""
        return self._thinking.is_thinking

    @property
    def has_calls(self) -> bool:
        return self._writer.num_calls > 0

    def start(self) -> list[Part]:
        """Return what the prompt itself has begun of the answer, once."""
        start, self._start = self._start, []
        return start

    def push(self, text: str) -> list[Part]:
        """Return what is now certain."""
        self._thinking.push(text)
        next(self._calls, None)
        return self._take()

    def end(self) -> list[Part]:
        """Return the rest. Nothing may be pushed afterwards."""
        self._thinking.end()
        self._reader.end()
        next(self._calls, None)
        self._writer.end()
        return self._take()

    def _take(self) -> list[Part]:
        parts = [*self._thoughts, *self._writer.take()]
        self._thoughts.clear()
        return parts


class _ReasoningPart:
    """The part of a parser that comes before the calls: it keeps the reasoning and hands the answer to `reader`."""

    def __init__(self, rules: AnswerRules, thoughts: list[Part], reader: StreamReader) -> None:
        self._source = StreamReader()
        self._splitter = reasoning.ReasoningReader(
            rules.opens_thinking, lambda text: thoughts.append(Reasoning(text)), reader.add)
        self._is_off = not rules.format.thinks or bool(rules.start)
        self._target = reader
        self._run = self._splitter.read(self._source)
        if not self._is_off:
            next(self._run, None)

    @property
    def is_thinking(self) -> bool | None:
        return False if self._is_off else self._splitter.is_thinking

    def push(self, text: str) -> None:
        if self._is_off:
            self._target.add(text)
        else:
            self._source.add(text)
            next(self._run, None)

    def end(self) -> None:
        if not self._is_off:
            self._source.end()
            next(self._run, None)


def _read_calls(rules: AnswerRules, reader: StreamReader, writer: CallWriter) -> Reads[None]:
    match rules.format.tool_parser if rules.reads_calls else None:
        case "hermes":
            yield from hermes.read_hermes(reader, writer)
        case "mistral":
            yield from mistral.read_mistral(reader, writer)
        case "qwen3_coder":
            yield from qwen3_coder.read_qwen3_coder(reader, writer, rules.schemas)
        case _:
            while not reader.is_at_end:
                writer.content(reader.take_rest())
                yield
