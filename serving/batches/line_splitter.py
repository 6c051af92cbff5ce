"""Lines of a file that comes in pieces. Pure: it keeps one line at most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from serving.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class RawLine:
    number: int             # from 1
    first_byte: int
    content: bytes


class LineSplitter:
    def __init__(self, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._rest = bytearray()        # of the line whose end has yet to come
        self._number, self._first_byte = 1, 0

    def feed(self, content: bytes, is_last: bool = False) -> Iterator[RawLine]:
        """Yield the lines that end here, blank ones left out. Raises InvalidRequestError for one that is too long."""
        *lines, rest = content.split(b"\n")
        for line in lines:
            yield from self._end(line)
        self._extend(rest)
        if is_last:
            yield from self._end(b"")

    def _end(self, content: bytes) -> Iterator[RawLine]:
        self._extend(content)
        line = RawLine(self._number, self._first_byte, bytes(self._rest))
        self._number, self._first_byte = self._number + 1, self._first_byte + len(line.content) + 1
        self._rest.clear()
        if line.content.strip():
            yield line

    def _extend(self, content: bytes) -> None:
        self._rest += content
        if len(self._rest) > self._max_line_bytes:
            raise InvalidRequestError(f"line {self._number} has more than {self._max_line_bytes} bytes",
                                      fix="shorten it")
