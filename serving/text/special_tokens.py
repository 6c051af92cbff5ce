"""Special tokens that clients write into their texts, kept apart from those that a chat template writes.

A prompt is one text by the time it is encoded, so a user's "<|im_end|>" would end the user's turn. Before a template
sees a text, a mark is put behind the first character of each special token in it. Behind the template, the special
tokens that are still whole get names of their own, the marks are taken out, and a tokenizer that knows special tokens
by these names only encodes the rest as text.
"""

from __future__ import annotations

import os.path
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence

import tokenizers
from pydantic import JsonValue

from serving.errors import InvalidRequestError

MAX_QUOTED = 16_384     # special tokens in the texts of one chat
_MARK_DIGITS = 16       # digits, which no filter of a template changes; so many that no text has them by chance
_WINDOW = 2**16         # characters that are searched at a time: one search keeps other threads out


class SpecialTokens:
    """Immutable after construction; may be used by any thread."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._mark = f"{secrets.randbelow(10**_MARK_DIGITS):0{_MARK_DIGITS}d}"
        added = sorted(backend.get_added_tokens_decoder().items())
        # One that is a single character cannot be broken.
        names = {token.content: token_id for token_id, token in added if token.special and len(token.content) > 1}
        contents = [*names]
        self._longest = max(map(len, contents), default=1)
        self._begins = re.compile("|".join(f"{re.escape(first)}(?={_trie(rests)})"
                                           for first, rests in _by_first(contents).items()) or "(?!)")
        self._whole = re.compile(_trie(contents) if contents else "(?!)")
        secret = secrets.token_hex(8)
        self._names = {content: f"<{secret}-{token_id}>" for content, token_id in names.items()}
        self._renamed, self._ids = _renamed(backend, self._names)

    def quote(self, value: JsonValue) -> JsonValue:
        """Return the value with a mark in each special token of its texts, keys of objects too.

        Raises InvalidRequestError where they are more than MAX_QUOTED.
        """
        return _Quoting(self).value(value)

    def marked(self, text: str, starts: Sequence[int]) -> str:
        """Return the text with a mark behind each of these characters."""
        ends = [0, *(start + 1 for start in starts), len(text)]
        return self._mark.join(text[begin:end] for begin, end in zip(ends, ends[1:], strict=False))

    def starts(self, text: str) -> Iterator[int]:
        """Yield where special tokens begin, also one within another."""
        return (found.start() for found in self._matches(self._begins, text))

    def is_quoted(self, text: str) -> bool:
        return self._mark in text

    def unquote(self, text: str) -> str:
        """Return the text without marks."""
        return text.replace(self._mark, "")

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a quoted text. Lets go of the GIL, as Tokenizer.encode does."""
        pieces, at = [], 0
        for found in self._matches(self._whole, text):
            pieces += [text[at:found.start()], self._names[found[0]]]
            at = found.end()
        named = self.unquote("".join((*pieces, text[at:])))
        ids = self._renamed.encode_batch_fast([named], add_special_tokens=False)[0].ids
        return [self._ids.get(token_id, token_id) for token_id in ids]

    def _matches(self, pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
        at = 0
        while at < len(text):
            end = at + _WINDOW
            for found in pattern.finditer(text, at, end + self._longest):
                if found.start() >= end:
                    break
                yield found
                at = found.end()
            at = max(at, end)


class _Quoting:
    """Quotes the texts of one chat."""

    def __init__(self, special: SpecialTokens) -> None:
        self._special = special
        self._num_found = 0

    def value(self, value: JsonValue) -> JsonValue:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, Mapping):
            return {self._text(key): self.value(entry) for key, entry in value.items()}
        return [self.value(entry) for entry in value] if isinstance(value, Sequence) else value

    def _text(self, text: str) -> str:
        starts: list[int] = []
        for start in self._special.starts(text):
            starts.append(start)
            self._num_found += 1
            if self._num_found > MAX_QUOTED:
                raise InvalidRequestError(f"the texts have more than {MAX_QUOTED} special tokens of the model",
                                          fix="write them otherwise: they are text here", param="messages")
        return self._special.marked(text, starts) if starts else text


def _renamed(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
    """Return a tokenizer that knows the added tokens by these names, and which ids of it are which of the backend."""
    renamed, ids = tokenizers.Tokenizer(backend.model), dict[int, int]()     # shares the vocabulary
    if backend.normalizer is not None:
        renamed.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        renamed.pre_tokenizer = backend.pre_tokenizer
    for token_id, token in sorted(backend.get_added_tokens_decoder().items()):
        name = names.get(token.content, token.content)
        renamed.add_tokens([tokenizers.AddedToken(
            name, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
            normalized=token.normalized, special=False)])
        if (renamed_id := renamed.token_to_id(name)) is not None:
            ids[renamed_id] = token_id
    return renamed, ids


def _by_first(texts: Iterable[str]) -> dict[str, list[str]]:
    """Return what follows each first character."""
    found: dict[str, list[str]] = {}
    for text in texts:
        found.setdefault(text[0], []).append(text[1:])
    return found


def _trie(texts: Sequence[str]) -> str:
    """Return a pattern of these texts, the longest first, that reads no character twice: there may be a thousand."""
    start = os.path.commonprefix(texts)
    rests = [text[len(start):] for text in texts]
    pattern = "|".join(re.escape(first) + _trie(more) for first, more in _by_first(filter(None, rests)).items())
    return re.escape(start) + (f"(?:{pattern}){'?' * ('' in rests)}" if pattern else "")
