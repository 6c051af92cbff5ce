from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint_files import INDEX_NAME
from model.checkpoint_writer import CheckpointWriter


def test_index_names_the_file_of_every_tensor(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 2)
    writer.add_file(0, lambda: {"a": torch.ones(2)})
    writer.add_file(1, lambda: {"b": torch.zeros(3, dtype=torch.bfloat16)})
    total_bytes = writer.finish()
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert set(index["weight_map"]) == {"a", "b"}
    assert torch.equal(load_file(tmp_path / index["weight_map"]["b"])["b"], torch.zeros(3, dtype=torch.bfloat16))
    assert total_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


def test_stopped_writer_goes_on_with_the_first_missing_file(tmp_path: Path) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt

    first = CheckpointWriter(tmp_path, 2)
    first.add_file(0, lambda: {"a": torch.ones(2)})
    with pytest.raises(KeyboardInterrupt):
        first.add_file(1, fail)
    second = CheckpointWriter(tmp_path, 2)
    second.add_file(0, fail)                # is there: must not be made again
    second.add_file(1, lambda: {"b": torch.ones(1)})
    second.finish()
    assert set(json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"]) == {"a", "b"}
