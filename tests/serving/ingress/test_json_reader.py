"""The reader of bodies is a JSON parser like any other, within its bounds."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import InvalidRequestError
from serving.ingress.json_reader import BodyBounds, Bounds, read_json

WIDE = BodyBounds(num_values=10_000, num_integers=10_000, depth=50, num_digits=400, num_key_characters=10_000,
                  default=Bounds(10_000, 10_000))
NARROW = BodyBounds(num_values=8, num_integers=6, depth=3, num_digits=5, num_key_characters=4, default=Bounds(4, 5),
                    fields={"ids": Bounds(10, 0), "o.deep": Bounds(1, 1)})

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner) | st.lists(st.integers(0, 10**12)) | st.dictionaries(texts, inner), max_leaves=30)


@given(st.dictionaries(texts, values), st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_what_json_writes_is_read_again(body: dict[str, object], ascii_only: bool, indent: int | str | None) -> None:
    assert read_json(json.dumps(body, ensure_ascii=ascii_only, indent=indent).encode(), WIDE) == body


@given(st.text(alphabet='{}[]:,"\\/abntrfu01289dDeE+-. \n\t\x00é😀', max_size=20))
def test_what_is_read_and_what_is_refused_is_as_in_the_standard_library(text: str) -> None:
    content = ('{"a":' + text + "}").encode()
    try:
        theirs = json.loads(content, parse_constant=float)
        json.dumps(theirs, ensure_ascii=False).encode()         # they let halves of pairs pass
        is_json = not any_twice(content)
    except (json.JSONDecodeError, UnicodeEncodeError):
        is_json = False
    try:
        ours = read_json(content, WIDE)
    except InvalidRequestError:
        assert not is_json
    else:
        assert is_json and repr(ours) == repr(theirs)


def any_twice(content: bytes) -> bool:
    found = []

    def note(pairs: list[tuple[str, object]]) -> None:
        found.append(len({key for key, _ in pairs}) < len(pairs))

    json.loads(content, object_pairs_hook=note)
    return any(found)


@given(st.binary(max_size=30))
def test_any_bytes_are_the_clients_error_or_an_object(content: bytes) -> None:
    try:
        assert isinstance(read_json(content, WIDE), dict)
    except InvalidRequestError as error:
        assert len(str(error)) < 300


@pytest.mark.parametrize(("content", "message"), [
    (b"", "not JSON: a value is wanted at byte 0"),
    (b"[]", "not a JSON object"),
    (b"{} {}", "not JSON: the end is wanted at byte 3, found '{}'"),
    (b'{"a": NaN}', "not JSON: a value is wanted"),
    (b'{"a": [1, 2,]}', "not JSON: a value is wanted"),
    (b'{"a": 01}', "a comma or } is wanted at byte 7"),
    (b'{"a": "\xff"}', "not UTF-8"),
    (b'{"a": "\\ud83d"}', "valid escapes"),
    (b'{"a": "\\x"}', "valid escapes"),
    (b'{"a": "\n"}', "a character or the end of a string"),
    (b'{"a": "', "a character or the end of a string"),
    (b'{"a": 1, "a": 2}', "a is given twice"),
    (b'{"o": {"b": 1, "b": 2}}', "o.b is given twice"),
    (b'{"a": [1, 2, 3, 4, 5]}', "a has more than 4 values"),
    (b'{"ids": [1, 2, 3, 4, 5, 6, 7, 8]}', "ids is where the body has more than 6 integers"),
    (b'{"a": [[[[1]]]]}', "a is nested deeper than 3 levels"),
    (b'{"a": {"b": {"c": {}}}}', "a.b.c is nested deeper than 3 levels"),
    (b'{"a": "123456"}', "a has a string of more than 5 characters"),
    (b'{"a": "' + b"\\u0041" * 6 + b'"}', "a has a string of more than 5 characters"),
    (b'{"o": {"deep": "12"}}', "o.deep has a string of more than 1 characters"),
    (b'{"abcde": 1}', "a key in the body has a string of more than 4 characters"),
    (b'{"a": 123456}', "a has a number of more than 5 digits"),
    (b'{"a": -0.12345}', "a has a number of more than 5 digits"),
    (b'{"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}', "the body has more than 4 fields"),
    (b'{"a": [{}, {}, {}], "b": [{}, {}, {}, {}]}', "b is where the body has more than 8 values"),
])
def test_what_is_refused_is_named(content: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read_json(content, NARROW)
    assert message in str(refused.value)


def test_bounds_themselves_are_allowed() -> None:
    read = read_json(b'{"a": "12345", "b": 12345, "ids": [1, 2, 3, 4, 5, 6, 7]}', NARROW)
    assert read == {"a": "12345", "b": 12345, "ids": [1, 2, 3, 4, 5, 6, 7]}
    assert read_json(b'{"a": "' + b"\\u0041" * 5 + b'"}', NARROW) == {"a": "AAAAA"}
    assert read_json(b'{"a": [[1]]}', NARROW) == {"a": [[1]]}


def test_a_number_beyond_floats_is_infinite_as_everywhere() -> None:
    assert read_json(b'{"a": 1e999}', WIDE) == {"a": math.inf}


@pytest.mark.parametrize("length", [262_143, 262_144, 262_145, 700_000])
@pytest.mark.parametrize("character", ["a", "é", "😀", "\n", '"'])
def test_long_strings_are_read_in_parts(length: int, character: str) -> None:
    bounds = BodyBounds(10, 10, 3, 5, 10, Bounds(10, 10**6))
    text = character * length
    for ascii_only in (False, True):
        assert read_json(json.dumps({"a": text}, ensure_ascii=ascii_only).encode(), bounds) == {"a": text}
