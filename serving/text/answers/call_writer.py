"""Collects what a parser finds: content and numbered calls."""

from __future__ import annotations

from serving.text.answers.parts import Arguments, CallStart, Content, Part
from serving.text.answers.stream_reader import SpaceHolder


class CallWriter:
    def __init__(self, max_calls: int | None = None) -> None:
        """Calls beyond `max_calls` are read and left out."""
        self._parts: list[Part] = []
        self._max_calls = max_calls
        self._content = SpaceHolder(lambda text: self._parts.append(Content(text)))
        self.num_calls = 0

    def take(self) -> list[Part]:
        """Return what was found since the last time."""
        taken, self._parts = self._parts, []
        return taken

    def content(self, text: str) -> None:
        """Add text beside the calls. White space around a call is left out."""
        self._content.add(text)

    def begin(self, name: str) -> None:
        self._content.drop()
        if self._is_wanted(self.num_calls):
            self._parts.append(CallStart(self.num_calls, name))
        self.num_calls += 1

    def write(self, arguments: str) -> None:
        """Add a piece of the arguments of the call that began last."""
        if arguments and self._is_wanted(self.num_calls - 1):
            self._parts.append(Arguments(self.num_calls - 1, arguments))

    def end(self) -> None:
        """Note that nothing follows."""
        if self.num_calls:
            self._content.drop()
        self._content.release()

    def _is_wanted(self, index: int) -> bool:
        return self._max_calls is None or index < self._max_calls
