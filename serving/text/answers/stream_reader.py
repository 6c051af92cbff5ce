"""Text that comes in pieces, read as if it were whole.

A parser is a generator that reads by these verbs and yields where it needs more text. What it emits depends on the
text alone, never on where the pieces end: a tag that may have begun is held back until it is certain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Reads = Generator[None, None, T]        # yields when it needs more text, returns what it read
_SPACES = re.compile(r"\s*")
_PLAIN = re.compile(r"[^\"\\]+")
_IN_BRACKETS = re.compile(r"[^\"\[\]{}]+")
_SCALAR = re.compile(r"[^\s,\]}]+")


class MalformedError(Exception):
    """The text is not of the format that is read."""


def ignore(text: str) -> None:
    """Emit nothing."""


class StreamReader:
    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._record: list[str] | None = None

    def add(self, text: str) -> None:
        self._text = self._text[self._at:] + text
        self._at = 0

    def end(self) -> None:
        self._ended = True

    @property
    def is_at_end(self) -> bool:
        return self._ended and self._at == len(self._text)

    def take_rest(self) -> str:
        """Return all text that has come."""
        return self._take(len(self._text) - self._at)

    def unread(self, text: str) -> None:
        """Put back what was read last."""
        self._at -= len(text)

    def start_record(self, begin: str) -> None:
        """Keep what is read from here on, behind `begin`, so that it can be given back as it was."""
        self._record = [begin]

    def take_record(self) -> str:
        record, self._record = "".join(self._record or ()), None
        return record

    def read_until(self, markers: Sequence[str], emit: Callable[[str], None]) -> Reads[str | None]:
        """Emit the text before the first marker; return the marker, which is then read, or None at the end."""
        pattern = re.compile("|".join(map(re.escape, markers)))
        while True:
            found = pattern.search(self._text, self._at)
            if found is not None:
                emit(self._take(found.start() - self._at))
                self._take(len(found[0]))
                return found[0]
            held = 0 if self._ended else _num_held(self._text, self._at, markers)
            emit(self._take(len(self._text) - self._at - held))
            if self._ended:
                return None
            yield

    def skip_space(self) -> Reads[str]:
        """Go to the next sign, and return it without reading it. Raises MalformedError at the end."""
        while True:
            found = _SPACES.match(self._text, self._at)
            self._take(found.end() - self._at if found is not None else 0)
            if self._at < len(self._text):
                return self._text[self._at]
            yield from self._more()

    def expect(self, wanted: str) -> Reads[None]:
        """Go past white space and the text wanted. Raises MalformedError."""
        yield from self.skip_space()
        while len(self._text) - self._at < len(wanted):
            if not wanted.startswith(self._text[self._at:]):
                raise MalformedError
            yield from self._more()
        if not self._text.startswith(wanted, self._at):
            raise MalformedError
        self._take(len(wanted))

    def starts_with(self, wanted: str) -> Reads[bool]:
        """Return whether the text goes on so after white space, and read it then."""
        try:
            yield from self.expect(wanted)
        except MalformedError:
            return False
        return True

    def read_json(self, emit: Callable[[str], None]) -> Reads[None]:
        """Emit the text of one JSON value as it comes. Brackets and strings are followed, no more is checked.

        Raises MalformedError where no value stands, or the text ends within it.
        """
        sign = yield from self.skip_space()
        if sign in "{[":
            yield from self._read_brackets(emit)
        elif sign == '"':
            yield from self._read_string(emit)
        else:
            yield from self._read_scalar(emit)

    def read_json_string(self) -> Reads[str]:
        """Return the string that a JSON string stands for. Raises MalformedError."""
        if (yield from self.skip_space()) != '"':
            raise MalformedError
        written: list[str] = []
        yield from self._read_string(written.append)
        try:
            text = str(json.loads("".join(written), strict=False))
            text.encode()
        except ValueError:
            raise MalformedError from None
        return text

    def _read_brackets(self, emit: Callable[[str], None]) -> Reads[None]:
        depth = 0
        while True:
            sign = self._text[self._at:self._at + 1]
            if sign == "":
                yield from self._more()
            elif sign == '"':
                yield from self._read_string(emit)
            elif sign in "{[":
                depth += 1
                emit(self._take(1))
            elif sign in "}]":
                depth -= 1
                emit(self._take(1))
                if depth == 0:
                    return
            else:
                emit(self._take_match(_IN_BRACKETS))

    def _read_string(self, emit: Callable[[str], None]) -> Reads[None]:
        emit(self._take(1))
        while True:
            sign = self._text[self._at:self._at + 1]
            if sign == "" or (sign == "\\" and len(self._text) - self._at < 2):
                yield from self._more()
            elif sign == '"':
                emit(self._take(1))
                return
            else:
                emit(self._take(2) if sign == "\\" else self._take_match(_PLAIN))

    def _read_scalar(self, emit: Callable[[str], None]) -> Reads[None]:
        if _SCALAR.match(self._text, self._at) is None:
            raise MalformedError
        while True:
            if self._at == len(self._text):
                if self._ended:
                    return
                yield
                continue
            if _SCALAR.match(self._text, self._at) is None:
                return
            emit(self._take_match(_SCALAR))

    def _take_match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        return self._take(found.end() - self._at if found is not None else 0)

    def _take(self, length: int) -> str:
        taken = self._text[self._at:self._at + length]
        self._at += length
        if self._record is not None:
            self._record.append(taken)
        return taken

    def _more(self) -> Reads[None]:
        if self._ended:
            raise MalformedError
        yield


class SpaceHolder:
    """Hands text on, but holds white space at its end back: before a tag it is dropped."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._held: list[str] = []

    def add(self, text: str) -> None:
        kept = text.rstrip()
        if kept:
            self.release()
            self._emit(kept)
        if len(kept) < len(text):
            self._held.append(text[len(kept):])

    def drop(self) -> None:
        self._held.clear()

    def release(self) -> None:
        if self._held:
            self._emit("".join(self._held))
        self._held.clear()


def _num_held(text: str, start: int, markers: Sequence[str]) -> int:
    """Return how many characters at the end may be the beginning of a marker."""
    longest = max(map(len, markers)) - 1
    for length in range(min(longest, len(text) - start), 0, -1):
        end = text[len(text) - length:]
        if any(marker.startswith(end) for marker in markers):
            return length
    return 0
