"""A JSON file of a checkpoint is read, or what is wrong with it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import CheckpointError
from model.json_file import parse_json_object, read_json_object, shown

NOT_AN_OBJECT = ["", "{", "[]", '"text"', "7", "null", "[" * 100_000, '{"a":' * 100_000]


@pytest.mark.parametrize("content", [b'{"a": "\xc3\xa9"}', b'\xef\xbb\xbf{"a": "\xc3\xa9"}'])
def test_an_object_in_utf8_is_read_whatever_the_locale(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read_json_object(tmp_path / "a.json") == {"a": "é"}


@pytest.mark.parametrize("content", NOT_AN_OBJECT)
def test_what_is_no_object_is_named_with_the_fix(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"a\.json .*fetch it again"):
        read_json_object(tmp_path / "a.json")
    with pytest.raises(CheckpointError, match=r"the header .*fetch it again"):
        parse_json_object(content, "the header")


def test_what_cannot_be_read_is_named_and_what_is_absent_is_for_the_caller(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    for name in ("folder.json", "latin.json"):
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read.*fetch it again"):
            read_json_object(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "absent.json")


def test_long_values_are_cut() -> None:
    assert shown([1]) == "[1]" and len(shown("x" * 1000)) == 80
