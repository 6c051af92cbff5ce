"""Byte ranges are read and counted; what is broken is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint import Checkpoint
from model.errors import CheckpointError, TensorError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(24.0).view(4, 3, 2), "b": torch.arange(5).to(torch.bfloat16),
               "scalar": torch.tensor(2.0), "empty": torch.empty(0, 3)},
              tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_reads_what_was_saved(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.tensors["a"].shape == (4, 3, 2) and checkpoint.tensors["b"].dtype == "BF16"
        assert torch.equal(checkpoint.read("a"), torch.arange(24.0).view(4, 3, 2))
        assert torch.equal(checkpoint.read("b"), torch.arange(5).to(torch.bfloat16))
        assert checkpoint.read("scalar").item() == 2.0
        assert checkpoint.read("empty").shape == (0, 3)


def test_reads_one_entry_and_counts_its_bytes_only(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.read("a", 2), torch.arange(12.0, 18.0).view(3, 2))
        assert checkpoint.bytes_read == 24


def test_index_of_several_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with Checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("a"), torch.ones(2)) and torch.equal(checkpoint.read("b"), torch.zeros(2))
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"misses 1 of 2 weight files: two\.safetensors"):
        Checkpoint(tmp_path)
    for text in ("{}", "no json", "[]"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json.*fetch it again"):
            Checkpoint(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        Checkpoint(tmp_path)


def test_truncated_file_names_the_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-6])
    with pytest.raises(TensorError, match=r"model\.safetensors is truncated: \d+ of \d+ bytes; incomplete are \w+"):
        Checkpoint(folder)
    for size in (0, 5, 20):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            Checkpoint(folder)


def test_file_cut_after_it_was_opened(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-110])
        with pytest.raises(TensorError, match="ends inside of"):
            for name in checkpoint.tensors:
                checkpoint.read(name)


@pytest.mark.parametrize("header", [
    b"[]", b"7", b"{", b"\xff", b"[" * 100_000, b'{"a": 7}', b'{"a": []}', b'{"a": {}}',
    *(json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | fields}).encode() for fields in (
        {"dtype": ["F32"]}, {"dtype": None}, {"shape": "1"}, {"shape": [-1]}, {"shape": [True]}, {"shape": [1.0]},
        {"shape": [[1]]}, {"data_offsets": [0]}, {"data_offsets": [0.0, 4.0]}, {"data_offsets": [-4, 0]},
        {"data_offsets": [4, 0]}, {"data_offsets": ["0", "4"]}, {"data_offsets": {"0": 4}}))])
def test_a_header_of_wrong_types_is_named(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file.*fetch it again"):
        Checkpoint(tmp_path)


def test_a_folder_in_place_of_a_weight_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"misses 1 of 1 weight files: model\.safetensors"):
        Checkpoint(tmp_path)


def test_a_file_that_is_gone_when_it_is_read_is_named(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        (folder / "model.safetensors").unlink()
        with pytest.raises(TensorError, match="cannot be read"):
            checkpoint.read("a")


def test_unknown_dtype_is_named(tmp_path: Path, write_tiny: Callable[..., Path]) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(TensorError, match="a has dtype I8"):
        checkpoint.read("a")
