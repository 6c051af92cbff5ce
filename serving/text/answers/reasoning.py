"""What a model thinks, between <think> and </think>, apart from what it answers."""

from __future__ import annotations

from collections.abc import Callable

from serving.text.answers.stream_reader import Reads, SpaceHolder, StreamReader

BEGIN, END = "<think>", "</think>"


def opens_thinking(prompt_end: str) -> bool:
    """Return whether the template has opened the block at the end of the prompt."""
    return prompt_end.rstrip().endswith(BEGIN)


def end_thinking(prompt: str) -> str:
    """Return the prompt with an empty block, where the template has opened one."""
    return f"{prompt.rstrip()}\n\n{END}\n\n" if opens_thinking(prompt) else prompt


class ReasoningReader:
    """Hands reasoning on until the block ends, and everything behind it as the answer. White space around the tags is
    left out."""

    def __init__(self, is_open: bool, reasoning: Callable[[str], None], answer: Callable[[str], None]) -> None:
        self.is_thinking: bool | None = True if is_open else None       # None: not known yet
        self._reasoning = SpaceHolder(_without_leading_space(reasoning))
        self._answer = answer

    def read(self, reader: StreamReader) -> Reads[None]:
        if self.is_thinking is None:
            reader.start_record("")
            self.is_thinking = yield from reader.starts_with(BEGIN)
            spaces = reader.take_record()
            if not self.is_thinking:
                self._answer(spaces)
        if self.is_thinking:
            marker = yield from reader.read_until([END], self._reasoning.add)
            if marker is None:
                self._reasoning.release()
            else:
                self._answer = _without_leading_space(self._answer)
        self.is_thinking = False
        while True:
            self._answer(reader.take_rest())
            if reader.is_at_end:
                return
            yield


def _without_leading_space(emit: Callable[[str], None]) -> Callable[[str], None]:
    has_begun = False

    def begin(text: str) -> None:
        nonlocal has_begun
        text = text if has_begun else text.lstrip()
        if text:
            has_begun = True
            emit(text)
    return begin
