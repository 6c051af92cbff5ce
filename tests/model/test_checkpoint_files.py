"""The index of a checkpoint is somebody else's text: its names stay inside of the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.checkpoint_files import INDEX_NAME, SINGLE_NAME, abbreviated, weight_file_names
from model.errors import CheckpointError


def test_one_file_or_those_of_the_index(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"b": "y", "a": "x", "c": "sub/z", "d": "x"}}))
    assert weight_file_names(tmp_path) == ["sub/z", "x", "y"]
    (tmp_path / SINGLE_NAME).write_text("")
    assert weight_file_names(tmp_path) == [SINGLE_NAME]


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", "", "a\0b", 7,
                                  None, ["a"], {"a": 1}])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: object) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        weight_file_names(tmp_path)


@pytest.mark.parametrize("content", ["[]", "7", "null", '{"weight_map": []}', '{"weight_map": "a"}', "{}", "{", ""])
def test_an_index_of_another_shape_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        weight_file_names(tmp_path)


def test_long_lists_are_abbreviated() -> None:
    assert abbreviated(["a", "b"]) == "a, b" and abbreviated(["a", "b", "c"], limit=2) == "a, b and 1 more"
