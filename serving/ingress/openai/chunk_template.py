"""The bytes of a streamed chunk that says nothing but the next piece of text, and its tokens where the client asked for
them, which is what most chunks say.

What surrounds index, text and tokens is taken from the model of the chunk, written once; so the wire is what the model
says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel
from pydantic_core import to_json

_INDEX = 1_618_033_988
_TEXT = "\x00 the text \x00"
_TOKEN_ID = 2_718_281_828


class ChunkTemplate:
    """Writes the chunks of one answer."""

    def __init__(self, make: Callable[[int, str, list[int] | None], BaseModel], shows_tokens: bool = False) -> None:
        """`make` returns the chunk of a choice's index, text and token ids. The ids, if shown, stand after the text."""
        written = to_bytes(make(_INDEX, _TEXT, [_TOKEN_ID] if shows_tokens else None))
        self._head, rest = written.rsplit(b"%d" % _INDEX, 1)     # what clients name stands before the choices
        self._middle, *between, self._tail = rest.split(to_json(_TEXT))
        self._between = between[0] if between else None         # reasoning is written under two names
        self._after_tokens: bytes | None = None
        if shows_tokens:
            self._tail, self._after_tokens = self._tail.split(b"%d" % _TOKEN_ID)

    def write(self, index: int, text: str, token_ids: Sequence[int] = ()) -> bytes:
        """Return the chunk; without tokens where the answer does not show them."""
        written = to_json(text)
        if self._between is not None:
            written = written + self._between + written
        if self._after_tokens is None:
            return b"%b%d%b%b%b" % (self._head, index, self._middle, written, self._tail)
        ids = ",".join(map(str, token_ids)).encode()
        return b"%b%d%b%b%b%b%b" % (self._head, index, self._middle, written, self._tail, ids,
                                    self._after_tokens)


def to_bytes(chunk: BaseModel) -> bytes:
    return chunk.model_dump_json().encode()
