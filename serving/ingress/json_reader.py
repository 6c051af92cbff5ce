"""Bytes -> JSON values, with bounds that hold before anything is made of the bytes.

A parser that knows no bounds makes hundreds of bytes of objects of `{},` and keeps every other thread out until it has
read the last byte. This one counts while it reads, so that a body is refused at the value that is too much, and it
gives others their turn, as all Python does. The grammar is RFC 8259, and one key stands once in an object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Never

from pydantic import JsonValue

from serving.errors import InvalidRequestError

_SPACE = rb"[ \t\n\r]*+"
_NUMBER = rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+"
# Most strings are short and have no escapes: one match reads them.
_SHORT = rb'"(?P<short>[^"\\\x00-\x1f]{0,256}+)"'
_SHORT_KEY = re.compile(_SPACE + _SHORT + _SPACE + b":")
_VALUE = re.compile(_SPACE + b"(?:" + _SHORT + b"|(?P<string>\")|(?P<number>" + _NUMBER + rb")|(?P<list>\[)|"
                    rb"(?P<object>\{)|(?P<true>true)|(?P<false>false)|(?P<null>null))" + _SPACE)
_QUOTE = re.compile(_SPACE + b'"')
_COLON = re.compile(_SPACE + b":")
# A part of a string: one match keeps other threads out, so it ends after some 500 kB at most.
_CHARACTERS = re.compile(rb'[^"\\\x00-\x1f]{0,262144}+(?:\\.[^"\\\x00-\x1f]{0,64}+){0,4096}+')
# Token ids in a row, each with the comma behind it: read at once, or a long prompt would take a second.
_INTEGERS = re.compile(b"(?:" + _SPACE + b"(?:0|[1-9][0-9]{0,9})" + _SPACE + b",){1,4096}+")
_SPACES = re.compile(_SPACE)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAX_SHOWN_PATH = 200
_CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds what one field may hold. `num_values`: entries of a list, also of one within it, or keys of an object."""

    num_values: int
    num_characters: int


@dataclass(frozen=True, slots=True)
class BodyBounds:
    """Bounds what a body may hold. `fields`: by name, `messages.content` for those of the objects in a list."""

    num_values: int             # of any kind but integers in lists
    num_integers: int           # in lists
    depth: int
    num_digits: int             # characters of a number
    num_key_characters: int
    default: Bounds
    fields: Mapping[str, Bounds] = field(default_factory=dict)
    free: tuple[str, ...] = ()  # a string below these may be as long as the body


def read_json(content: bytes, bounds: BodyBounds) -> dict[str, JsonValue]:
    """Return the object that a body holds. Raises InvalidRequestError, which names field, number and bound."""
    return _Reader(content, bounds).read()


class _Reader:
    def __init__(self, content: bytes, bounds: BodyBounds) -> None:
        self._content = content
        self._bounds = bounds
        self._at = 0
        self._num_values = 0
        self._num_integers = 0

    def read(self) -> dict[str, JsonValue]:
        try:
            value = self._value("", 0)
        except UnicodeDecodeError:
            raise InvalidRequestError("the body is not UTF-8", fix="encode it so") from None
        if self._at != len(self._content):
            self._refuse("the end")
        if not isinstance(value, dict):
            raise InvalidRequestError("the body is not a JSON object", fix="send an object with the request's fields")
        return value

    def _value(self, path: str, depth: int) -> JsonValue:
        found = _VALUE.match(self._content, self._at)
        if found is None:
            self._refuse("a value")
        self._count_value(path)
        kind = str(found.lastgroup)
        if kind == "short":
            self._at = found.end()
            return self._bounded(found["short"].decode(), path, self._of(path).num_characters)
        if kind == "string":
            self._at = found.end("string")
            text = self._string(path, self._of(path).num_characters)
            self._skip(_SPACES, "the end of a string")
            return text
        self._at = found.end()
        if kind == "number":
            return self._number(*found.span("number"), path)
        if kind in _CONSTANTS:
            return _CONSTANTS[kind]
        if depth == self._bounds.depth:
            self._over(path, "is nested deeper than", self._bounds.depth, "levels")
        return self._list(path, depth + 1) if kind == "list" else self._object(path, depth + 1)

    def _list(self, path: str, depth: int) -> JsonValue:
        values: list[JsonValue] = []
        limit = self._of(path).num_values
        if self._content[self._at:self._at + 1] == b"]":
            self._skip_bracket()
            return values
        while True:
            while (found := _INTEGERS.match(self._content, self._at)) is not None:
                self._at = found.end()
                run = [int(number) for number in found[0][:-1].split(b",")]
                values += run
                self._count_integers(len(run), path)
                if len(values) > limit:
                    self._over(path, "has more than", limit, "values")
            values.append(self._value(path, depth))
            if len(values) > limit:
                self._over(path, "has more than", limit, "values")
            if self._separator(b"]"):
                return values

    def _object(self, path: str, depth: int) -> JsonValue:
        members: dict[str, JsonValue] = {}
        limit = self._of(path).num_values
        if self._content[self._at:self._at + 1] == b"}":
            self._skip_bracket()
            return members
        while True:
            key = self._key(f"a key in {path or 'the body'}")
            name = f"{path}.{key}" if path else key
            if key in members:
                raise InvalidRequestError(f"{name[:_MAX_SHOWN_PATH]} is given twice", fix="give it once",
                                          param=name[:_MAX_SHOWN_PATH])
            members[key] = self._value(name, depth)
            if len(members) > limit:
                self._over(path, "has more than", limit, "fields")
            if self._separator(b"}"):
                return members

    def _key(self, path: str) -> str:
        """Read a key and its colon."""
        limit, found = self._bounds.num_key_characters, _SHORT_KEY.match(self._content, self._at)
        if found is not None:
            self._at = found.end()
            return self._bounded(found["short"].decode(), path, limit)
        self._skip(_QUOTE, "a key")
        key = self._string(path, limit)
        self._skip(_COLON, "a colon")
        return key

    def _separator(self, end: bytes) -> bool:
        """Read what follows a value, and return whether it was the end of its list or object."""
        separator = self._content[self._at:self._at + 1]
        if separator == end:
            self._skip_bracket()
        elif separator == b",":
            self._at += 1
        else:
            self._refuse(f"a comma or {end.decode()}")
        return separator == end

    def _skip_bracket(self) -> None:
        """Go past a bracket and the space behind it, so that every value ends where the next sign begins."""
        self._at += 1
        self._skip(_SPACES, "the end")

    def _skip(self, pattern: re.Pattern[bytes], wanted: str) -> None:
        found = pattern.match(self._content, self._at)
        if found is None:
            self._refuse(wanted)
        self._at = found.end()

    def _string(self, path: str, limit: int) -> str:
        """Read from behind the first quote to behind the last."""
        start = self._at
        while self._content[self._at:self._at + 1] != b'"':
            before = self._at
            self._skip(_CHARACTERS, "a character")
            if self._at == before:
                self._refuse("a character or the end of a string")
            if self._at - start > 12 * limit:       # one character is 12 bytes at most: \ud83d\ude00
                self._over(path, "has a string of more than", limit, "characters")
        end = self._at
        has_escapes = self._content.find(b"\\", start, end) >= 0
        text = self._unescaped(start, end) if has_escapes else self._content[start:end].decode()
        self._at = end + 1
        return self._bounded(text, path, limit)

    def _bounded(self, text: str, path: str, limit: int) -> str:
        if len(text) > limit:
            self._over(path, "has a string of more than", limit, "characters")
        return text

    def _unescaped(self, start: int, end: int) -> str:
        try:
            text = str(json.loads(self._content[start - 1:end + 1]))
            if _SURROGATE.search(self._content, start, end):
                text.encode()
        except (json.JSONDecodeError, UnicodeEncodeError):      # no such escape, or half of a pair
            self._at = start
            self._refuse("a string with valid escapes")
        return text

    def _number(self, start: int, end: int, path: str) -> int | float:
        if end - start > self._bounds.num_digits:
            self._over(path, "has a number of more than", self._bounds.num_digits, "digits")
        written = self._content[start:end]
        return int(written) if written.removeprefix(b"-").isdigit() else float(written)

    def _count_value(self, path: str) -> None:
        self._num_values += 1
        if self._num_values > self._bounds.num_values:
            self._over(path, "is where the body has more than", self._bounds.num_values, "values")

    def _count_integers(self, number: int, path: str) -> None:
        self._num_integers += number
        if self._num_integers > self._bounds.num_integers:
            self._over(path, "is where the body has more than", self._bounds.num_integers, "integers in lists")

    def _of(self, path: str) -> Bounds:
        default = self._bounds.default
        if path.startswith(self._bounds.free):
            return replace(default, num_characters=len(self._content))
        return self._bounds.fields.get(path, default)

    def _over(self, path: str, what: str, limit: int, unit: str) -> Never:
        name = path if len(path) <= _MAX_SHOWN_PATH else f"{path[:_MAX_SHOWN_PATH]}..."
        raise InvalidRequestError(f"{name or 'the body'} {what} {limit} {unit}", param=name or None,
                                  fix=f"send at most {limit}")

    def _refuse(self, wanted: str) -> Never:
        near = self._content[self._at:self._at + 20].decode(errors="replace")
        raise InvalidRequestError(f"the body is not JSON: {wanted} is wanted at byte {self._at}, found {near!r}",
                                  fix="send one JSON object")
