"""Token ids -> text, piece by piece: never half a character, stop strings cut exactly.

However a sequence is split into pushes, the pieces concatenate to the same text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

from serving.text.tokenizer import Tokenizer

_MAX_CHARACTER_BYTES = 4    # of UTF-8


class Piece(NamedTuple):
    """Holds what one push added. After `stop_string` is set nothing more may be pushed."""

    text: str
    stop_string: str | None = None
    num_tokens_kept: int = 0        # of those pushed: up to the one that completed the stop string


class StopString:
    """A stop string and its table of Knuth, Morris and Pratt: how much of it a text still ends with after a miss.

    Immutable: made once for a request. A matcher's state is the number of characters that the text ends with.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self._fallback = [0] * len(stop)
        length = 0
        for index in range(1, len(stop)):
            while length and stop[index] != stop[length]:
                length = self._fallback[length - 1]
            length += stop[index] == stop[length]
            self._fallback[index] = length

    def push(self, num_matched: int, character: str) -> int:
        """Return the state after one more character; len(stop): the text now ends with the stop string."""
        while num_matched and (num_matched == len(self.stop) or self.stop[num_matched] != character):
            num_matched = self._fallback[num_matched - 1]
        return num_matched + (self.stop[num_matched] == character)

    def num_pending(self, num_matched: int) -> int:
        """Return how many characters at the end of the text the next match may begin with."""
        return self._fallback[-1] if num_matched == len(self.stop) else num_matched


class Detokenizer:
    """The text of one choice. It continues the prompt's: a space between them is kept."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], stop: Sequence[str] = (),
                 include_stop_str_in_output: bool = False, skip_special_tokens: bool = True,
                 min_tokens: int = 0) -> None:
        """Stop strings that are complete within the first `min_tokens` tokens do not count."""
        self._tokenizer = tokenizer
        self._skipped_ids = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._includes_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._stops = tuple(StopString(stop_string) for stop_string in stop)
        self._num_matched = [0] * len(stop)         # state of each stop string
        self._half = b""                # of a character, whose other bytes are still to come
        self._num_tokens = 0
        self._held = ""                 # decoded, but perhaps the beginning of a stop string
        self._at_start = True
        self._decode_prompt_end(prompt_token_ids)

    def copy(self) -> Detokenizer:
        """Return one for another choice of the same request, in the state of this one."""
        other = copy(self)
        other._num_matched = list(self._num_matched)
        return other

    def push(self, token_ids: Sequence[int]) -> Piece:
        """Add tokens, and return the text that is now certain."""
        if not self._stops:
            content = b"".join(map(self._bytes, token_ids))
            return Piece(self._decode(content), None, len(token_ids))
        text = ""
        for index, token_id in enumerate(token_ids):
            self._num_tokens += 1
            piece, stop_string = self._add(self._decode(self._bytes(token_id)))
            text += piece
            if stop_string is not None:
                return Piece(text, stop_string, num_tokens_kept=index + 1)
        return Piece(text, num_tokens_kept=len(token_ids))

    def flush(self) -> str:
        """Return the rest of a text that no stop string ended; half a character becomes U+FFFD."""
        text = self._held + self._decode(b"", is_final=True)
        self._held = ""
        return text

    def _decode_prompt_end(self, token_ids: Sequence[int]) -> None:
        """Begin where the prompt ended, which may be inside a character."""
        tail: list[bytes] = []
        for token_id in reversed(token_ids):
            if len(tail) == _MAX_CHARACTER_BYTES:
                break
            if token_id not in self._skipped_ids and (content := self._tokenizer.token_bytes(token_id)):
                tail.insert(0, content)
        if tail:
            self._at_start = False
            self._decode(b"".join(tail))

    def _decode(self, content: bytes, is_final: bool = False) -> str:
        content = self._half + content
        text, num_read = codecs.utf_8_decode(content, "replace", is_final)
        self._half = content[num_read:]
        return text

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._skipped_ids:
            return b""
        content = self._tokenizer.token_bytes(token_id)
        if content and self._at_start:
            self._at_start = False
            return self._tokenizer.style.at_the_start(content)
        return content

    def _add(self, text: str) -> tuple[str, str | None]:
        """Return the text to emit, and the stop string that ends it."""
        states = self._num_matched
        for index, character in enumerate(text):
            states = [stop.push(state, character) for stop, state in zip(self._stops, states, strict=True)]
            complete = [stop.stop for stop, state in zip(self._stops, states, strict=True) if state == len(stop.stop)]
            if complete and self._num_tokens > self._min_tokens:
                longest = max(complete, key=len)
                known = self._held + text[:index + 1]
                self._held = ""
                return known if self._includes_stop else known.removesuffix(longest), longest
        self._num_matched = states
        known = self._held + text
        num_held = 0 if self._includes_stop else max(
            stop.num_pending(state) for stop, state in zip(self._stops, states, strict=True))
        self._held = known[len(known) - num_held:]
        return known[:len(known) - num_held], None
