"""The index of a checkpoint is somebody else's text: its names stay inside of the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.checkpoint_files import INDEX_NAME, SINGLE_NAME, abbreviated, weight_file_names
from model.errors import CheckpointError


def test_one_file_or_those_of_the_index(tmp_path: Path) -> None:
    files_of = {"b": "y.safetensors", "a": "x.safetensors", "c": "sub/z.safetensors", "d": "x.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": files_of}))
    assert weight_file_names(tmp_path) == ["sub/z.safetensors", "x.safetensors", "y.safetensors"]
    (tmp_path / SINGLE_NAME).write_text("")
    assert weight_file_names(tmp_path) == [SINGLE_NAME]


@pytest.mark.parametrize("name", [
    "../outside.safetensors", "/etc/passwd.safetensors", "a/../../b.safetensors", "./a.safetensors", "a//b.safetensors",
    "..\\outside.safetensors", "C:\\a.safetensors", "C:a.safetensors", "https://host/a.safetensors"])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map\['w'\] is .* not within the .*write the"):
        weight_file_names(tmp_path)


@pytest.mark.parametrize("name", ["", "..", "/", "/etc/passwd", "model.bin", "a\0.safetensors", "a\n.safetensors", 7,
                                  1.5, None, True, ["a.safetensors"], {"a": 1}])
def test_an_index_names_safetensors_files_only(tmp_path: Path, name: object) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"ok": "a.safetensors", "w": name}}))
    with pytest.raises(CheckpointError, match=r"weight_map\['w'\] is .* not the name of a \.safetensors file.*write"):
        weight_file_names(tmp_path)


@pytest.mark.parametrize("content", ['{"weight_map": []}', '{"weight_map": "a"}', '{"weight_map": null}', "{}",
                                     '{"weight_map": {}}', '{"weight_map": 7, "metadata": {}}'])
def test_a_weight_map_of_another_type_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map is .*fetch it again"):
        weight_file_names(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"7", b"{", b"", b"\xff\xfe{}", b"[" * 100_000])
def test_an_index_that_is_no_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json .*fetch it again"):
        weight_file_names(tmp_path)


def test_a_folder_in_place_of_the_index_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).mkdir()
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        weight_file_names(tmp_path)


def test_long_lists_are_abbreviated() -> None:
    assert abbreviated(["a", "b"]) == "a, b" and abbreviated(["a", "b", "c"], limit=2) == "a, b and 1 more"
