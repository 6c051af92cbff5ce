"""The bytes of a streamed chunk that says nothing but the next piece of text, which is what most chunks say.

What surrounds index and text is taken from the model of the chunk, written once; so the wire is what the model says.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel
from pydantic_core import to_json

_INDEX = 1_618_033_988
_TEXT = "\x00 the text \x00"


class ChunkTemplate:
    """Writes the chunks of one answer."""

    def __init__(self, make: Callable[[int, str], BaseModel]) -> None:
        """`make` returns the chunk of a choice's index and text."""
        written = to_bytes(make(_INDEX, _TEXT))
        self._head, rest = written.rsplit(b"%d" % _INDEX, 1)     # what clients name stands before the choices
        self._middle, self._tail = rest.split(to_json(_TEXT))

    def write(self, index: int, text: str) -> bytes:
        return b"".join((self._head, b"%d" % index, self._middle, to_json(text), self._tail))


def to_bytes(chunk: BaseModel) -> bytes:
    return chunk.model_dump_json().encode()
